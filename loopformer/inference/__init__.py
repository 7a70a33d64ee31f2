"""Generation, exits, and evaluation."""
