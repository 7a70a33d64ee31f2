"""Runs, configurations and measurements."""
