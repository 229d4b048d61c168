"""From files to networks and back: a checkpoint is found, opened, looked into, loaded and written."""
