"""Video files.

In import order: `containers` (what files say of themselves), `tone_map`, `index`, `av_input`,
`av_pixels` and `pyav` (files by PyAV), `decord_video`.
"""
