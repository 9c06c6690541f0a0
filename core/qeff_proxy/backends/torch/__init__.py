"""PyTorch, the reference."""
