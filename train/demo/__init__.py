"""Data of the embedded demo."""
