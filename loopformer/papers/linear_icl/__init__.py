"""Linear looped transformers for learning in context (2410.08292, 2502.21212)."""
