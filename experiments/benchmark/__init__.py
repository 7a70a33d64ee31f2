"""Benchmarks: scripts that print tables; see __main__.py."""
