"""Judge a base model and a predictor: the same as `butler-jax eval`."""

import sys

from butler_jax.cli.eval import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
