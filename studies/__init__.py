"""Experiments that are run once and reported, `python -m studies.NAME`."""
