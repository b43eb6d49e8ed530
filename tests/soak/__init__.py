"""Hours under load that nobody watches: ``python -m tests.soak --help``."""
