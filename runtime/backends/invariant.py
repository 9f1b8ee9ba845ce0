"""Under which recipe does a row's bits depend on nothing but itself, and how does any call come into its form?

A recipe joins `runtime.models.invariant.InvariantDecoder` with linear layers that answer a row alike however many rows
stand beside it:

    tile     queries in tiles of 16 (2 on ONNX Runtime), and linear layers of one kernel: packed oneDNN ones (eager;
             inductor by freezing), ONNX Runtime's prepacked ones
    strict   MKL's strict mode (MKL_CBWR=AVX512,STRICT, or AVX2,STRICT), which is a pin of the process and has to stand
             in its environment before MKL computes anything; no tiles, default kernels
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtime.backends.contract import Bounds, StepInputs
from runtime.models.config import ModelConfig
from runtime.models.layout import COLUMNS, TILE, columns_for

RECIPE = "recipe"
"""The flag that names a package's recipe."""
RECIPES = ("tile", "strict")
TILES = {"onnxruntime": 2}
"""Backends whose attention needs less than `TILE`: ONNX Runtime's differs for one query only."""
MULTIPLES = {"onnxruntime": 16}
"""Backends whose sums need less than `COLUMNS`: each lane of ONNX Runtime's widest vector adds every 16th column."""
NARROW = 1024
"""Up to so many summed columns packed linears answer one row as they answer many; wider ones need two rows."""


def recipe_of(flags: Mapping[str, str]) -> str:
    """Read the recipe from a preparation's or a package's flags."""
    return flags.get(RECIPE, RECIPES[0])


def tile_of(flags: Mapping[str, str], backend: str) -> int:
    """Return the tile of queries that the recipe needs on a backend."""
    return TILES.get(backend, TILE) if recipe_of(flags) == "tile" else 1


def columns_of(backend: str) -> int:
    """Return of what the columns are a multiple on a backend."""
    return MULTIPLES.get(backend, COLUMNS)


def program_bounds(bounds: Bounds) -> Bounds:
    """Widen S by the new tokens: in the invariant layout they have columns of their own."""
    return Bounds(
        max_batch=max(2, bounds.max_batch),
        max_tokens=bounds.max_tokens,
        max_context=columns_for(bounds.max_context + bounds.max_tokens),
    )


def least_rows(config: ModelConfig) -> int:
    """Return the fewest rows (B*T) of a call that the packed linears answer as they answer many."""
    widest = max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    return 1 if widest <= NARROW else 2


def arrange(inputs: StepInputs, *, rows: int = 1, multiple: int = COLUMNS) -> StepInputs:
    """Bring a call into the layout by position: slots [B,S] with a column for every cached and new token.

    S becomes the smallest multiple of `multiple` that holds them all; columns past a row's cached positions are not
    read.  A call of fewer than `rows` rows gets its only row twice.
    """
    tokens, positions, slots, lengths = inputs
    batch, count = tokens.shape
    width = -(-(int(lengths.max()) + count) // multiple) * multiple
    have = slots.shape[1]
    if have != width:
        wide = np.zeros((batch, width), dtype=np.int64)
        wide[:, : min(have, width)] = slots[:, :width]
        slots = wide
    if batch * count < rows:
        return tokens.repeat(2, 0), positions.repeat(2, 0), slots.repeat(2, 0), lengths.repeat(2, 0)
    return tokens, positions, slots, lengths
