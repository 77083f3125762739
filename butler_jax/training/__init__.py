"""Distillation: losses, the pass that forms gradients, the step and the loop.

`distil` trains a predictor for a base.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["FitConfig", "TrainConfig"],
        "distillation": ["default_run_dir", "distil", "init_predictor"],
        "loop": ["NonFiniteLoss", "check_run", "fit", "open_run"],
        "step": ["learning_schedule", "make_optimiser", "make_train_step", "start_state"],
    },
)
