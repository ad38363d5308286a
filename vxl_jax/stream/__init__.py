"""The stream of tokens of a sample: its plan, and padded batches. No JAX in here.

In import order: `plan`, `batch`.
"""
