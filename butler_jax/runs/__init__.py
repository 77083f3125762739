"""The directory of a training run: its lock, the record of its starts, its settings and its checkpoints.

Only `checkpoints` imports Orbax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoints": ["Checkpoints", "joined"],
        "directory": ["claim", "holder", "recorded", "records"],
        "finished_checkpoints": ["read_facts", "steps"],
        "inspection": ["base_of", "inspect_run"],
        "provenance": ["command", "versions"],
        "saved_predictor": ["about", "load_predictor", "save_predictor"],
        "settings": ["read_settings", "run_config", "run_data"],
    },
)
