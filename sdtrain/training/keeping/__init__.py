"""What a run keeps so that it can go on: its states, what they were trained on, and what may change later."""
