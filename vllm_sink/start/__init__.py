"""The start of an engine: the hook, every check, log lines."""
