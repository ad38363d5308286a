"""Whole models, and the pure functions over them.

In import order: `video_xl`, `functions`, `loss`, `lora`, `int8`.
"""
