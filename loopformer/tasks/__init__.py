"""Tasks: each turns a seed and an index into one training example."""
