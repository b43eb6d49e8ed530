"""A soak: hours of load on a real server. ``python -m tests.soak --help``."""
