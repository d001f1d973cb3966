"""How long a report of a long run takes."""
