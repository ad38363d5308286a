"""Video-XL in JAX: long videos through a compressed memory.

Axis legend, used by every einsum and shape comment:

    B batch    F frames or tiles   P patches      G groups of windows   W windows
    T tokens   Q queries (places in a window)     S keys                V visual tokens, vocabulary
    M memory   N heads             K KV heads     H head size           D width
    L layers
"""
