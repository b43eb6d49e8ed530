"""The settings as values: sections and pattern files are read here, once."""
