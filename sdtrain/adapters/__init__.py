"""Small trainable weights beside frozen ones, and the names other tools know them by."""
