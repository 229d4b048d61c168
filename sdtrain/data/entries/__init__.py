"""Which cached encodings are needed, which there are, and reading them ahead of their use."""
