"""Decoders in a child process that can be ended.

In import order: `process`, `decoding`. `vxl_jax.media` imports neither.
"""
