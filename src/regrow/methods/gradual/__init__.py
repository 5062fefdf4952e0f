"""Methods whose density follows a plan."""
