"""Parallel Loop Transformer (LoopCoder-v2, section 2)."""
