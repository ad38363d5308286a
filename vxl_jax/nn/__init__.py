"""Network modules and kernels: arrays in, arrays out. No files, no tokenizer.

In import order: `sharding`, `memory`, `rope`, `scan`, `layers`, `attention`, `groups`,
`collect`, `qwen2`, `clip`, `projector`.
"""
