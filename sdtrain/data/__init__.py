"""From folders of pictures and captions to the batches of every step."""
