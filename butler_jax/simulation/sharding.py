"""How a simulated pass lies on the mesh that jax.set_mesh names. Without a mesh, arrays stay as they are.

Rows of the batch are split over `data`, heads over `model`, and the tokens of a row over `sequence`. The query rows of
each chunk are split over `sequence` too, and its keys are whole, so no choice of a row depends on other devices. A
dimension stays whole where the axis size does not divide it.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from butler_jax.model import LOGICAL_AXES, BaseModel, LayerView, embed
from butler_jax.parallel import EVALUATION_RULES, constrain, constrain_module


def split_text(batch: dict[str, Int[Array, "B T"]]) -> dict[str, Int[Array, "B T"]]:
    """The arrays of a batch by rows and tokens."""
    return {name: constrain(array, ("batch", "tokens")) for name, array in batch.items()}


def embed_split(model: BaseModel, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """The residual stream that enters layer 0, split as `split_stream` does."""
    looked_up = constrain(embed(model, tokens), ("whole", "tokens", "width"))  # the table is split by width
    return split_stream(looked_up)


def split_tables(model: BaseModel) -> BaseModel:
    """The model with its tables by vocabulary, over `sequence` too, and whole in width: a loop over rows reads them."""
    if not isinstance(model, BaseModel):
        return model
    axes = LOGICAL_AXES | dict.fromkeys(("embedding", "unembedding"), ("vocab", "whole"))
    return constrain_module(constrain_module(model, axes, EVALUATION_RULES), axes)  # at once, XLA gathers all of them


def split_row_groups(x: Float[Array, "groups B C E"]) -> Float[Array, "groups B C E"]:
    """Groups of rows of a stream, by rows of the batch and of the group."""
    return constrain(x, ("whole", "batch", "tokens", "whole"))


def rows_here(x: Float[Array, "B C E"]) -> Float[Array, "B C E"]:
    """One group, by rows of the batch."""
    return constrain(x, ("batch", "whole", "whole"))


def split_stream(x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """A residual stream by rows and tokens."""
    return constrain(x, ("batch", "tokens", "whole"))


def split_heads(x: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
    """Queries, keys, values or outputs by rows, tokens and heads."""
    return constrain(x, ("batch", "tokens", "cached_heads", "whole"))


def split_view(view: LayerView) -> LayerView:
    """What a layer's mixer sees, by rows, tokens and heads."""
    heads = {name: split_heads(getattr(view, name)) for name in ("q", "k", "k_pre", "v")}
    return view._replace(x=split_stream(view.x), **heads)


def split_keys_whole(x: Float[Array, "B K S D"]) -> Float[Array, "B K S D"]:
    """Keys or values by rows and heads, all tokens on each device."""
    return constrain(x, ("batch", "cached_heads", "whole", "whole"))


def split_chunks(x: Float[Array, "chunks B K G C D"]) -> Float[Array, "chunks B K G C D"]:
    """Queries or outputs in chunks, by rows of the batch, heads and rows of a chunk."""
    return constrain(x, ("whole", "batch", "cached_heads", "whole", "tokens", "whole"))


def split_scores(x: Float[Array, "B K G C S"]) -> Float[Array, "B K G C S"]:
    """Scores of a chunk, likewise."""
    return constrain(x, ("batch", "cached_heads", "whole", "tokens", "whole"))


def rows_whole(x: Float[Array, "B T H D"], kv_heads: int) -> Float[Array, "B T H D"]:
    """Queries, keys or values by rows and KV heads, all tokens on each device; `sequence` splits the heads too."""
    groups = x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1])
    return constrain(groups, ("batch", "whole", "kv_heads", "whole", "whole")).reshape(x.shape)
