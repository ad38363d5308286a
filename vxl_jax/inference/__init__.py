"""Watching media and answering questions about them, over a network that is loaded.

In import order: `ratios`, `runtime` (network, tokenizer, limits), `entries` (what is on a device),
`watching` (frames into entries), `memory_file`, `memory` (VisualMemory), `chat`, `model` (Model),
`options` and `cli` (python -m vxl_jax.generate).
"""
