"""A config as text: on which line each setting stands."""
