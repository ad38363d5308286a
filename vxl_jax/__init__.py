"""Video-XL in JAX: long videos through a compressed memory.

Names are imported when they are first used: data workers use this package without importing JAX.
`__init__.pyi` lists them; docs/api.md describes them. CONTRIBUTING.md has the legend of axis
letters that every einsum and shape comment uses.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
