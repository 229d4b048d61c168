"""Experiment trackers as watchers: TensorBoard, Weights & Biases and trackio, each an extra that may be absent."""
