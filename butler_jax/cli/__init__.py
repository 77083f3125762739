"""The command `butler-jax`: one module for each subcommand.

Heavy imports happen inside the functions that need them, so that --help is quick."""
