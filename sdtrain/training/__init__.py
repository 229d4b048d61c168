"""The training loop and what surrounds it. The only folder that knows the others."""
