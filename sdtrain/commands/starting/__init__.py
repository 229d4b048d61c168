"""Beginning without a config: what is there is looked at, and a first config is made of it. No torch."""
