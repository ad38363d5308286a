"""Network modules and kernels: arrays in, arrays out. No files, no tokenizer in here.

In import order: `sharding`, `memory`, `rope`, `scan`, `layers`, `attention`, `groups`, `qwen2`,
`clip`, `projector`.
"""
