"""Measurements: `python -m benchmarks.NAME [--json FILE]`. Figures depend on the machine, which each run prints."""
