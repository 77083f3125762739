"""Distillation of a predictor: losses, objective, optimiser step and loop.

`distil` trains a predictor for a base. `fit` is the loop of any training.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["FitConfig", "TrainConfig"],
        "distillation": ["default_run_dir", "distil", "init_predictor"],
        "loop": ["NonFiniteLoss", "Run", "check_run", "fit", "open_run"],
        "sensitivity": ["weigh_errors"],
        "step": ["TrainState", "learning_schedule", "make_optimiser", "make_train_step", "start_state"],
    },
)
