"""The directory of a training run: its lock, the record of its starts, its settings and its checkpoints.

Only `checkpoints` imports Orbax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoints": ["Checkpoints", "copy_to_host", "joined"],
        "directory": ["Record", "claim", "holder", "recorded", "records", "started_elsewhere"],
        "finished_checkpoints": ["pick_best", "read_facts", "steps"],
        "inspection": ["base_of", "inspect_run"],
        "provenance": ["command", "devices", "environment", "revision", "versions"],
        "saved_predictor": ["about", "load_predictor", "load_run_base", "save_predictor", "stored_config"],
        "settings": ["find_run", "read_settings", "run_base", "run_config", "run_data"],
    },
)
