"""What sparse training is compared with."""
