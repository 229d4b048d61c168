"""What a person should know about their pictures before training."""
