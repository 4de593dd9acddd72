"""Pre-training of CLIP-family image-text models in JAX."""
