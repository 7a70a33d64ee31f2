"""Masked diffusion: what hides tokens in training, what is learned of it, and samplers that reveal them
(docs/denoising.md).
"""
