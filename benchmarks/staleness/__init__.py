"""What masks over sequences drop of rollouts that are some updates old."""
