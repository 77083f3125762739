"""Train a predictor: the same as `butler-jax train` (`python train.py pretrain` is `butler-jax pretrain`)."""

import sys

from butler_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
