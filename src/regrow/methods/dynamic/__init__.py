"""Dynamic sparse training: the number of connections stays, their places move."""
