"""Read images, animations and folders of frames.

In import order: `loading`, `folder`, `animation`.
"""
