"""The names and numbers by which other tools know adapters."""
