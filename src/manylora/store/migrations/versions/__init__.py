"""Each version has a file, an honest step from the one before. A released one never changes."""
