"""What capture costs the server."""
