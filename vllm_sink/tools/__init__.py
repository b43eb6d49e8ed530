"""Tools that a user runs beside the server."""
