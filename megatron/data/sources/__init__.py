"""Sources of text: a file for each kind, and a registry of the kinds."""
