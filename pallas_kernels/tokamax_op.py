"""The sparse decode attention as an op of tokamax, with configurations to tune. Needs Python 3.12 and tokamax.

    import tokamax
    from pallas_kernels import tokamax_op

    tokamax_op.register()
    out = tokamax.sparse_decode_attention(q, k, v, q_imp, k_imp, lengths, n)
    tuned = tokamax.autotune(step, *arguments)  # finds the op in any function that calls it
    with tuned:
        step(*arguments)

Each implementation is an op, as in tokamax: "xla" runs everywhere, "triton" on GPU and "mosaic" on TPU.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import jax
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.checks import tpu_can
from pallas_kernels.composed import sparse_decode_attention as attend
from pallas_kernels.gpu.tiles import TRIALS, Tiles, current_tiles, try_tiles

try:
    import pydantic
    import tokamax
    from tokamax._src.autotuning import api as tuning
    from tokamax._src.numerics import RangedArrayInitializer
except ModuleNotFoundError as error:
    raise ImportError(
        f"pallas_kernels.tokamax_op needs tokamax, and {error.name} is not installed: pip install "
        "'butler-jax[tokamax]' with Python 3.12 or newer. Without tokamax, the same attention is "
        "pallas_kernels.sparse_decode_attention"
    ) from error

FULL = 2**30  # a length beyond every cache, which the kernels cut to its size


def with_value(value: int) -> pydantic.AfterValidator:
    """Lets tokamax tune with this value in an array of which it knows only the shape. Its own are random."""

    def initialise(array: Any) -> Any:
        if not isinstance(array, jax.ShapeDtypeStruct):
            return array
        return RangedArrayInitializer(array.shape, array.dtype, value, value + 1)

    return pydantic.AfterValidator(initialise)


@dataclasses.dataclass(frozen=True)
class SparseDecodeAttention(tokamax.Op):
    """Decode attention over the best tokens of a cache, in XLA. The residual is the log-sum-exp [B, H].

    Attributes:
        interpret: Whether kernels are interpreted, slowly, on any platform.
    """

    platform: ClassVar[str | None] = None  # every one
    interpret: bool = False

    def _fwd(
        self,
        q: Float[Array, "B H D"],
        k: Float[Array, "*L B K S D"],
        v: Float[Array, "*L B K S D"],
        q_imp: Float[Array, "B K G R"],
        k_imp: Num[Array, "*L B Q R S"],
        lengths: Annotated[Int[Array, " B"], with_value(FULL)],
        n: int,
        *,
        counts: Annotated[Int[Array, "B *K"] | None, with_value(FULL)] = None,
        sinks: int = 0,
        recent: int = 0,
        unit: int = 1,
        first: Annotated[Int[Array, " B"] | None, with_value(0)] = None,
        threshold: Float[Array, "*B K"] | None = None,
        pooling: str = "normalised",
        offset: Float[Array, "B K G"] | None = None,
        scales: Float[Array, "*B Q"] | None = None,
        score_scale: float | None = None,
        new_k: Float[Array, "B K D"] | None = None,
        new_v: Float[Array, "B K D"] | None = None,
        scale: float | None = None,
        layer: Annotated[Int[Array, ""] | int | None, with_value(0)] = None,
        return_residuals: bool,
        config: Any,
    ) -> tuple[Float[Array, "B H D"], Float[Array, "B H"] | None]:
        with self._using(config):
            found = attend(
                *(q, k, v, q_imp, k_imp, lengths, n),
                counts=counts,
                sinks=sinks,
                recent=recent,
                unit=unit,
                first=first,
                threshold=threshold,
                pooling=pooling,
                offset=offset,
                scales=scales,
                score_scale=score_scale,
                new_k=new_k,
                new_v=new_v,
                scale=scale,
                layer=layer,
                return_residual=return_residuals,
                implementation=self.platform or "xla",
                interpret=self.interpret or None,
            )
        return found if return_residuals else (found, None)

    def _using(self, config: Any) -> contextlib.AbstractContextManager:
        """Where kernels are traced with a configuration; XLA has none."""
        return contextlib.nullcontext()

    def supported_on(self, device: jax.Device) -> bool:
        """Whether the implementation runs on this device."""
        platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
        return self.interpret or self.platform in (None, platform)


@dataclasses.dataclass(frozen=True)
class TritonSparseDecodeAttention(SparseDecodeAttention):
    """The Pallas kernels for GPU. The configuration is `Tiles`, the sizes of their blocks and grids."""

    config_cls: ClassVar[type] = Tiles
    platform: ClassVar[str | None] = "gpu"
    config: Tiles | None = None

    def _using(self, config: Tiles):
        return try_tiles(config)

    def _get_heuristics_config(self, ba: tokamax.BoundArguments) -> Tiles:
        return current_tiles()

    def _get_autotuning_configs(self, ba: tokamax.BoundArguments) -> set[Tiles]:
        best = current_tiles()
        return {dataclasses.replace(best, **{name: value}) for name, values in TRIALS.items() for value in values}


@dataclasses.dataclass(frozen=True)
class MosaicSparseDecodeAttention(SparseDecodeAttention):
    """The Pallas kernels for TPU, which take units of whole words of 32 bits. They have no configuration."""

    platform: ClassVar[str | None] = "tpu"


IMPLEMENTATIONS = {
    "xla": SparseDecodeAttention(),
    "triton": TritonSparseDecodeAttention(),
    "mosaic": MosaicSparseDecodeAttention(),
}


def sparse_decode_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "*L B K S D"],
    v: Float[Array, "*L B K S D"],
    q_imp: Float[Array, "B K G R"],
    k_imp: Num[Array, "*L B Q R S"],
    lengths: Int[Array, " B"],
    n: int,
    *,
    implementation: str | Sequence[str] | None = None,
    return_residuals: bool = False,
    **options: Any,
) -> Any:
    """Decode attention over the n best units of every row's cache, through tokamax.

    Args:
        q, k, v, q_imp, k_imp, lengths, n: See `pallas_kernels.sparse_decode_attention`.
        implementation: A key of IMPLEMENTATIONS, or several, of which the first one that this device supports runs.
            None: the kernels of the platform, and "xla" where they do not suit it.
        return_residuals: Whether to return the log-sum-exp [B, H] too.
        options: Those of `pallas_kernels.sparse_decode_attention` but return_residual, return_selection and interpret.

    Raises:
        ExceptionGroup: No implementation of these runs on this device.
        ValueError: An implementation is unknown, or the arguments do not fit together.
    """
    if implementation is None:
        pages = tpu_can(options.get("unit", 1), k)
        implementation = ("triton", "mosaic", "xla") if pages else ("triton", "xla")
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown or not names:
        raise ValueError(f"unknown implementation {unknown or names}; use None or one of {', '.join(IMPLEMENTATIONS)}")
    errors = []
    for name in names:
        try:
            op = IMPLEMENTATIONS[name]
            return op(q, k, v, q_imp, k_imp, lengths, n, return_residuals=return_residuals, **options)
        except NotImplementedError as error:
            errors.append(error)
    raise ExceptionGroup("all implementations failed", errors)


def register() -> None:
    """Make the op known to tokamax: as `tokamax.sparse_decode_attention`, in `tokamax.ops`, and to `tokamax.autotune`.

    `tokamax.autotune(..., all_implementations=True)` then tries all implementations that run on the device.

    Raises:
        RuntimeError: This version of tokamax keeps its implementations otherwise.
    """
    known = getattr(tuning, "_API_IMPLEMENTATIONS", None)
    if known is None:
        raise RuntimeError(
            f"tokamax {tokamax.__version__} has no table of implementations where version 0.0.17 has it; call "
            "pallas_kernels.tokamax_op.sparse_decode_attention, which needs no registration"
        )
    tuning._API_IMPLEMENTATIONS = type(known)({**known, SparseDecodeAttention: IMPLEMENTATIONS})
    tokamax.sparse_decode_attention = tokamax.ops.sparse_decode_attention = sparse_decode_attention
