"""The sizes in which the GPU kernels divide their work, for each chip.

`tiles.json` has what `python -m pallas_kernels.tune` found on chips, by their name. Other chips take the defaults.

Entries marked `modelled` are from `tune --model`, not from a measurement. The A100 has the only one: it has fewer
multiprocessors than `choosers`, so a part of the selection's programs would wait for a second wave. For H100, H200 and
B200 the model finds no grid that is better by five per cent. The model varies grids only, and they depend on the number
of rows alone, so the table has one entry a chip.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from pallas_kernels.checks import current_device

TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of blocks and grids.

    All but `attend_stages`, `choosers`, `programs` and `least_tokens` are powers of two.
    """

    score_tokens: int = 512
    """Tokens that a program scores."""
    score_warps: int = 4
    """Warps of a program that scores."""
    held: int = 32768
    """Largest row of units that a program of the selection holds in registers."""
    candidates: int = 16384
    """Candidates for the threshold that it holds, of larger rows."""
    select_warps: int = 32
    """Warps of a program of the selection, at most."""
    written: int = 4096
    """Units that it writes at a time, at most; less than 32768."""
    choosers: int = 132
    """Programs of the selection among which the units of all rows are split."""
    attend_bytes: int = 16384
    """Bytes of keys that a program of the attention reads at a time, for up to 16 query heads; fewer for more."""
    attend_stages: int = 2
    """Stages of the loop over them: how many loads are in flight."""
    attend_warps: int = 4
    """Warps of a program of the attention."""
    programs: int = 528
    """Programs among which the tokens of all rows are split."""
    least_tokens: int = 128
    """Tokens that a program of the attention reads at least."""

    def attend_tokens(self, width: int, itemsize: int, group: int) -> int:
        """Tokens that the attention reads at a time: width elements a key and `group` query heads, both padded."""
        return max(16, 16 * self.attend_bytes // (width * itemsize * group))


TRIALS: dict[str, tuple[int, ...]] = {
    "attend_bytes": (4096, 8192, 32768),
    "attend_stages": (1, 3, 4, 5),
    "attend_warps": (2, 8),
    "programs": (264, 1056, 2112),
    "least_tokens": (32, 64, 256),
    "score_tokens": (128, 256, 1024, 2048),
    "score_warps": (2, 8),
    "held": (8192, 16384),
    "candidates": (8192,),
    "select_warps": (8, 16),
    "written": (2048, 8192),
    "choosers": (66, 108, 264),
}
"""Other values of the settings that tuning tries, one setting after the other."""


_tried: list[Tiles] = []


def current_tiles() -> Tiles:
    """The tiles that kernels are traced with: those on trial, or those of the chip that they are for."""
    if _tried:
        return _tried[-1]
    device = current_device()
    return tiles_of((device if hasattr(device, "device_kind") else jax.devices()[0]).device_kind)


@functools.cache
def tiles_of(chip: str) -> Tiles:
    """The tiles of a chip by its name: those of the table, or the defaults."""
    table = json.loads(TABLE.read_text())
    return Tiles(**table[chip]["tiles"]) if chip in table else Tiles()


def is_measured(chip: str) -> bool:
    """Whether the table has tiles that were measured on a chip."""
    found = json.loads(TABLE.read_text()).get(chip)
    return found is not None and not found.get("modelled", False)


@contextlib.contextmanager
def try_tiles(tiles: Tiles) -> Iterator[None]:
    """Trace kernels with these tiles."""
    _tried.append(tiles)
    try:
        yield
    finally:
        _tried.pop()


def write_tiles(chip: str, tiles: Tiles, about: dict) -> None:
    """Put the tiles of a chip into the table, and what is known of their measurement."""
    table = json.loads(TABLE.read_text())
    table[chip] = {**about, "tiles": asdict(tiles)}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    tiles_of.cache_clear()
