"""What a model costs: operations, bytes, and cards that have them."""
