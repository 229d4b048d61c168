"""Captions: where they stand, what they say, and how they vary."""
