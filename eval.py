"""Evaluate a base model and a predictor: `python eval.py` is `butler-jax eval`."""

import sys

from butler_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
