"""Caches that outlive a call, so that the next turn of a conversation reads only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from butler_jax.decoding.prefill_pass import Kept
from butler_jax.parallel import current_mesh

if TYPE_CHECKING:
    from butler_jax.decoding.cache import DecodeState


class PromptCache:
    """What one call of `generate` or `chat` leaves for the next one whose prompt begins with the same tokens.

    Give the same object to every call of a conversation. A call reads its prompt from the first token at which it
    differs from those held. Its tokens are those of a call without a cache, up to the order of sums. Dense decoding
    leaves the prompt and its new tokens. Under a selection, new tokens attended to a part of what was before them, and
    a prompt attends to everything, so only the prompt is left.

    Nothing is held with `offload`, under a policy that evicts, and with a predictor whose k_imp is in int8. What was
    held is dropped where the model, the predictor or the mesh is another one, and where a prompt lies on the other side
    of longrope's original context.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop what is held, and its memory."""
        self._state: DecodeState | None = None
        self._owner: tuple[Any, ...] = ()
        self._tokens: list[int] = []
        self._new: list[Any] = []  # tokens [1] that are still on the device
        self._length, self._dense = 0, False
        self._ticket: object | None = None

    def check(self, rows: Sequence[Sequence[int]]) -> None:
        """Raise ValueError where there are several rows."""
        if len(rows) != 1:
            raise ValueError(f"a cache is for one prompt, and there are {len(rows)}; leave it out, or give one prompt")

    def take(self, model: Any, predictor: Any, row: Sequence[int]) -> Kept | None:
        """Return the caches of the tokens with which a row begins, and drop them here. None where none are held."""
        state, length, border = self._state, self._length, model.config.rope.border
        same = all(a is b for a, b in zip(self._owner[:2], (model, predictor), strict=False))
        usable = state is not None and same and self._owner[2] == current_mesh()
        usable = usable and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))  # of an interrupted step
        usable = usable and (border is None or (length > border) == (len(row) > border))
        held = self._tokens + [int(token[0]) for token in jax.device_get(self._new)] if usable else []
        self.clear()
        pairs = zip(held, row[:-1], strict=False)  # the last token is run for its logits
        count = next((n for n, (old, new) in enumerate(pairs) if old != new), min(len(held), len(row) - 1))
        return Kept(state.kv, state.scores, jnp.asarray(count, jnp.int32)) if count else None

    def hold(self, model: Any, predictor: Any, state: DecodeState, tokens: list[int], *, dense: bool) -> object:
        """Hold the state of a prompt. dense: whether what follows it reads everything.

        Returns:
            What `add` takes. It is void once the cache is taken or cleared, or holds another prompt.
        """
        self._owner, self._state, self._dense = (model, predictor, current_mesh()), state, dense
        self._tokens, self._new, self._length, self._ticket = list(tokens), [], len(tokens), object()
        return self._ticket

    def add(self, ticket: object, state: DecodeState, token: Any) -> None:
        """Hold the state after one more token [1]. With a void ticket, do nothing."""
        if ticket is not self._ticket:
            return
        self._state, self._length = state, self._length + 1
        if self._dense:
            self._new.append(token)
