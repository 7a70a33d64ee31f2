"""Layers and what they are made of. Linen modules, and the frozen parts inside them."""
