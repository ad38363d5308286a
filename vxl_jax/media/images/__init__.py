"""Still and moving images, and folders of frames.

In import order: `loading`, `folder`, `animation`.
"""
