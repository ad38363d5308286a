"""Ask about videos and images: the command line of `vxl_jax.inference.cli`.

python -m vxl_jax.generate --help
"""

import sys

from vxl_jax.inference.cli import main

if __name__ == "__main__":
    sys.exit(main())
