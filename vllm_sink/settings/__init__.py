"""The settings as values: pattern files are read once, where an engine begins."""
