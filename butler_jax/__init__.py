"""TokenButler in JAX: a frozen language model, and a small trained predictor of the cached tokens its next step needs.

    import butler_jax

    base = butler_jax.load_base("tiny")
    predictor = butler_jax.distil(base, butler_jax.TrainConfig(steps=300))
    report = butler_jax.evaluate(base, predictor)
    butler_jax.generate(base, "Once upon a time", predictor=predictor, stream=lambda piece: print(piece.text, end=""))

Source: "TokenButler: Token Importance is Predictable", arXiv 2503.07518.
"""

from butler_jax.checkpoints import load_predictor, save_predictor
from butler_jax.configs import EvalConfig, PredictorConfig, SelectionConfig, TrainConfig
from butler_jax.data import batches
from butler_jax.decode import decode_step
from butler_jax.evaluation import calibrate_thresholds, evaluate
from butler_jax.filling import prefill
from butler_jax.generation import Generated, Piece, generate, generate_stream
from butler_jax.predictor_training import distil, init_predictor
from butler_jax.weights import Base, load_base

__all__ = [
    "Base",
    "EvalConfig",
    "Generated",
    "Piece",
    "PredictorConfig",
    "SelectionConfig",
    "TrainConfig",
    "batches",
    "calibrate_thresholds",
    "decode_step",
    "distil",
    "evaluate",
    "generate",
    "generate_stream",
    "init_predictor",
    "load_base",
    "load_predictor",
    "prefill",
    "save_predictor",
]
