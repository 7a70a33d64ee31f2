"""To CoT or To Loop (2505.19245), A Formal Comparison Between Chain of Thought and Latent Thought (2509.25239)."""
