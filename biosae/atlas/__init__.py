"""A page to look at every latent of a run, doubt it, and name it."""
