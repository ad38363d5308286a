"""Checkpoints: bytes on disk to parameters, and back.

In import order: `json_files`, `names`, `tensors`, `safetensors_read`, `safetensors_write`,
`arrays`, `hf_tower`, `hf_config`, `orbax_tree`, `load`, `digest`.
"""
