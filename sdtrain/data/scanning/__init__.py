"""Looking through folders: which files there are, and which of them belong together."""
