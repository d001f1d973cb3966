"""Figures of the mismatch, from sums that add up over batches and ranks."""
