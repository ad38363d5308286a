"""Attention over the memory and the own window."""
