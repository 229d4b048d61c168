"""The names and numbers other tools know adapters by."""
