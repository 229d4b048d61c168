"""The mathematics of a step: pure functions on tensors, each with its source."""
