"""What makes a run ready for others: its model card, a folder for hubs, and the way to the Hugging Face Hub."""
