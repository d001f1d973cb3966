"""Both real engines on a machine without a GPU, for tests, examples and benchmarks; not part of the wheel."""
