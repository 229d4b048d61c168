"""A file's adapters put on the layers of a model: to train on, or to draw with."""
