"""Train a predictor: `python train.py` is `butler-jax train`, `python train.py pretrain` is `butler-jax pretrain`."""

import sys

from butler_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] if sys.argv[1:2] == ["pretrain"] else ["train", *sys.argv[1:]]))
