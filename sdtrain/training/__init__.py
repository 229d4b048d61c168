"""The training loop and what surrounds it; below the commands, the only folder that knows all the others."""
