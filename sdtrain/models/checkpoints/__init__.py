"""From files to networks and back: found, opened, looked into, filled, written."""
