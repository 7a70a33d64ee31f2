"""Reasoning with latent thoughts (2502.17416)."""
