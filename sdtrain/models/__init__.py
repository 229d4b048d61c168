"""The networks that train: loading and freezing them, how prompts reach them, how they draw pictures."""
