"""The scheduler's pause in a running server when long requests end."""
