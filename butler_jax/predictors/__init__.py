"""The interface of a predictor (`base`), the order in which its methods run (`walk`), and the three predictors.

Another predictor is one more file and one more row of PREDICTORS.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["Attend", "Context", "Predictor", "at", "schedule", "zeros_of"],
        "config": ["PredictorConfig"],
        "contextual": ["Contextual"],
        "lookahead": ["Lookahead"],
        "pretrained": ["CARD", "CONFIG", "FORMAT", "WEIGHTS"],
        "producer": ["Producer"],
        "registry": ["PREDICTORS", "make_predictor", "predictor_class"],
    },
)
