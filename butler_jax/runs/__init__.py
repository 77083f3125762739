"""The directory of a training run: who holds it, what it records, and its checkpoints.

Only `checkpoints` imports Orbax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoints": ["Checkpoints", "about", "joined", "load_predictor", "save_predictor"],
        "directory": [
            "LEVELS",
            "RECORDS",
            "claim",
            "holder",
            "read_records",
            "recorded",
            "records",
            "run_config",
            "run_data",
        ],
        "provenance": ["command", "versions"],
    },
)
