"""Decode video files.

In import order: `containers` (container formats), `tone_map`, `index`, `av_input`,
`av_pixels` and `pyav` (files by PyAV), `decord_video`.
"""
