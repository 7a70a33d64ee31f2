"""Padded and looped transformers as theory has them: Exact Expressive Power of Transformers with Padding (Merrill and
Sabharwal, 2505.18948), and A Little Depth Goes a Long Way (the same, 2503.03961).

Attention that averages the best, norms of chosen dimensions, numbers as unit vectors, and weights that are constructed.
"""
