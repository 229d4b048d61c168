"""What a checkpoint becomes: networks, noise schedule and how prompts reach them."""
