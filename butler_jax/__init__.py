"""TokenButler in JAX: a frozen language model, and a small trained predictor of the cached tokens its next step needs.

    import butler_jax

    base = butler_jax.load_base("tiny")
    predictor = butler_jax.distil(base, butler_jax.TrainConfig(steps=300))
    report = butler_jax.evaluate(base, predictor)
    butler_jax.generate(base, "Once upon a time", predictor=predictor, stream=lambda piece: print(piece.text, end=""))

Source: "TokenButler: Token Importance is Predictable", arXiv 2503.07518.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "weights": ["Base", "adapt_model", "load_base"],
        "model": ["ModelAdapter"],
        "evaluation": ["EvalConfig", "evaluate"],
        "predictors": ["PredictorConfig"],
        "selection": ["SelectionConfig"],
        "training": ["TrainConfig", "distil", "init_predictor", "weigh_errors"],
        "data": ["read_batches"],
        "simulation": ["calibrate_thresholds", "calibrate_tolerance"],
        "decoding": [
            "Completion",
            "Generated",
            "Piece",
            "PromptCache",
            "Request",
            "SamplingConfig",
            "chat",
            "decode_step",
            "generate",
            "generate_stream",
            "prefill",
            "serve",
        ],
        "storage": ["use_compilation_cache"],
        "runs": ["load_predictor", "save_predictor"],
    },
)
