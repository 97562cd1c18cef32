"""What a latent means: examples, maps, concepts, explanations, stress tests, names."""
