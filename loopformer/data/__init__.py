"""Text, tokenizers, prepared text, and batches."""
