"""Mixture-of-Recursions (2507.10524)."""
