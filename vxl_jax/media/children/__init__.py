"""Decode media in a child process that can be killed.

In import order: `process`, `decoding`. `vxl_jax.media` imports neither.
"""
