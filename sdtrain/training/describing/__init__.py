"""What is said in the header of a run's file: of its training, and what its author says of it."""
