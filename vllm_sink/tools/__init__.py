"""What a user runs beside the server."""
