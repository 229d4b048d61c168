"""Sections of settings that stand on their own, and what all values may be; `schema` puts them together."""
