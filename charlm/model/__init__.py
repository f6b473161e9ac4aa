"""The network: characters to hidden states, and hidden states to logits."""
