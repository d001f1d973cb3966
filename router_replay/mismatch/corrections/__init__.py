"""Weights and masks that correct for the mismatch."""
