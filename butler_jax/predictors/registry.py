"""Predictors by name. Another predictor is one more file and one more row here."""

from __future__ import annotations

import jax

from butler_jax.model import BaseConfig
from butler_jax.predictors.base import Predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.predictors.contextual import Contextual
from butler_jax.predictors.lookahead import Lookahead
from butler_jax.predictors.producer import Producer

PREDICTORS: dict[str, type[Predictor]] = {p.kind: p for p in (Lookahead, Producer, Contextual)}


def make_predictor(base: BaseConfig, config: PredictorConfig, seed: int = 0) -> Predictor:
    """Make a predictor with random parameters. Under jax.eval_shape it takes no memory.

    Raises:
        ValueError: PREDICTORS lacks config.kind, or the base's sizes do not suit the predictor.
    """
    return predictor_class(config.kind)(base, config, jax.random.key(seed))


def predictor_class(kind: str) -> type[Predictor]:
    """The class of a kind. Raises ValueError where PREDICTORS lacks it."""
    if kind not in PREDICTORS:
        raise ValueError(f"unknown predictor {kind!r}; known: {', '.join(PREDICTORS)}")
    return PREDICTORS[kind]
