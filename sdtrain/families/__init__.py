"""What families of models are made of: components, names, published configurations, words; no torch."""
