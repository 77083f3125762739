"""`python -m butler_jax` is the command `butler-jax`."""

import sys

from butler_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
