"""The door between the published PyTorch checkpoint and this implementation."""
