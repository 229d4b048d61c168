"""What a run will need, known before it is run: its steps are traced on tensors that have shapes and no numbers."""
