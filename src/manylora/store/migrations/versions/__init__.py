"""One file a version, each an honest step from the one before. A released one never changes."""
