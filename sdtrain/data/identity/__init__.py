"""What pictures are known by, and which of them are held out because of it."""
