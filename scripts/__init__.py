"""Commands of the repository: ``python -m scripts.NAME`` from its root."""
