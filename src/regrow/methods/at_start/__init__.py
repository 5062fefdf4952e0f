"""Methods that choose the topology before training; it never changes afterwards."""
