"""The model: embedding, attention, MLP, head and loss."""
