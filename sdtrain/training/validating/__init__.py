"""The loss on pictures that are held out: measured the same way every time, kept, and acted upon."""
