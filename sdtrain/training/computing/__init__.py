"""What a step computes: the loss, what it is held to, and its gradients."""
