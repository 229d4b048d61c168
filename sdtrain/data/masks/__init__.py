"""Masks: which part of a picture counts in the loss."""
