"""These need JAX's CUDA plugin, which has a separate environment (`make test-gpu-compile`):
next to it, JAX looks for a GPU in every other test. Without the plugin they are not collected.
"""

from vxl_jax.planning.cards import find_card
from vxl_jax.planning.compiler import compiler_for

if not compiler_for(find_card("h100")).is_exact:
    collect_ignore_glob = ["test_*.py"]
