"""What stands for every expert of a row that nobody recorded, as this package's server sends it to stacks."""

UNKNOWN = -1
