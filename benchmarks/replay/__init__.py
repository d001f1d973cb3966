"""What replay costs the trainer."""
