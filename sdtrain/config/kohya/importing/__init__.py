"""Turns configs of sd-scripts and kohya_ss into one of ours, with a comment on every option."""
