"""``biosae search | diff | export | atlas``: what a latent means, and what is like it."""
