"""What one paper alone uses, a folder a paper."""
