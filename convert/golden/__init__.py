"""Golden numbers of the published implementations against this one; `convert.parity` runs them.

In import order: `compare`, `video_xl`, `llava`, `media`.
"""
