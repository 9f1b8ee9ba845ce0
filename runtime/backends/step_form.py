"""How is a step handed its cached context?  The inputs and outputs of the exported program, in two forms.

gathered    the two pools whole, and each row's slots in them: the program looks its context up itself
resident    each row's context in its place, a table a layer and side, which the program fills (`models.resident`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from runtime.backends.contract import Bounds
from runtime.models.config import ModelConfig
from runtime.models.decoder import PRECISIONS

EXAMPLE = (3, 5, 17, 29)
"""Batch, tokens, context and pool slots to trace with: never 0 or 1, and no two alike, else export ties them."""
POOL_SLOTS = (2, 1 << 24)
"""Range of the pool's slots a layer; any size works, so it is a symbol and no pin of the package."""


@dataclass(frozen=True, kw_only=True)
class StepForm:
    """One model's step as a program: what goes in and comes out, and which dimensions are free."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: tuple[Tensor, ...]
    """Inputs that the program is traced with; only their shapes matter."""
    dynamic_shapes: tuple[Any, ...]
    """As torch.export wants them."""
    places: Mapping[str, tuple[str, int]]
    """Where each named dimension stands: an input and its axis."""
    bounds: Bounds
    """Largest sizes inside the program."""
    layout: Mapping[str, str]
    """How keys and values lie in memory, for the record."""
    unchecked: frozenset[str] = frozenset()
    """Inputs whose dimensions the runtime itself lays out, so that no stage need conserve them."""
    free: str | None = None
    """What symbols are called that are not declared; None where all are."""


MakeForm = Callable[[ModelConfig, str, Bounds], StepForm]
"""Configuration, precision and the program's largest sizes to the form."""


def gathered_form(config: ModelConfig, precision: str, bounds: Bounds) -> StepForm:
    """Make the form with pools and slots, whose dimensions are B, T, S and the pool's rows."""
    batch, _, context, slots = EXAMPLE
    pool = _numbers(config.num_layers * slots, config.kv_width, dtype=PRECISIONS[precision])
    gathered = torch.arange(batch * context).remainder(slots).reshape(batch, context)
    ids, positions, lengths = _own_inputs(config)
    b, t, s = _dims(bounds)
    rows = config.num_layers * Dim("P", min=POOL_SLOTS[0], max=POOL_SLOTS[1])
    return StepForm(
        inputs=("token_ids", "positions", "k_pool", "v_pool", "slots", "context_lengths"),
        outputs=("logits", "new_k", "new_v"),
        example=(ids, positions, pool, pool.flip(0).contiguous(), gathered, lengths),
        dynamic_shapes=({0: b, 1: t}, {0: b, 1: t}, {0: rows}, {0: rows}, {0: b, 1: s}, {0: b}),
        places={"B": ("token_ids", 0), "T": ("token_ids", 1), "S": ("slots", 1), "layers*P": ("k_pool", 0)},
        bounds=bounds,
        layout=dict.fromkeys(("k_pool", "v_pool"), "flat rows layer*P+slot, row-major"),
        unchecked=frozenset({"k_pool", "v_pool"}),
        free="P",
    )


def resident_form(config: ModelConfig, precision: str, bounds: Bounds) -> StepForm:
    """Make the form with a table a layer and side: dimensions B, T and S, which has columns for the new tokens too.

    W is how many tokens' logits are wanted of a row.
    """
    batch, tokens, context, _ = EXAMPLE
    bounds = replace(bounds, max_context=bounds.max_context + bounds.max_tokens)
    table = _numbers(batch, context, config.kv_width, dtype=PRECISIONS[precision])
    count = 2 * config.num_layers
    b, t, s = _dims(bounds)
    w = Dim("W", min=1, max=bounds.max_tokens)
    wanted = torch.arange(1, tokens)[None, :, None].expand(batch, tokens - 1, 1).contiguous()
    return StepForm(
        inputs=(
            "token_ids",
            "positions",
            "context_lengths",
            "wanted",
            *(f"tables_{number}" for number in range(count)),
        ),
        outputs=("logits", *(f"filled_{number}" for number in range(count))),
        # No two alike: torch.export takes tensors that are one object for one input.
        example=(*_own_inputs(config), wanted, *(table.roll(number, 1) for number in range(count))),
        dynamic_shapes=({0: b, 1: t}, {0: b, 1: t}, {0: b}, {0: b, 1: w}, ({0: b, 1: s},) * count),
        places={"B": ("token_ids", 0), "T": ("token_ids", 1), "S": ("tables_0", 1), "W": ("wanted", 1)},
        bounds=bounds,
        layout={"tables": "keys, then values of each layer: row, position, column of all heads; filled in place"},
        free="W",
    )


def _own_inputs(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Make token ids, positions [B,T] and context lengths [B]; behind the context is room for the new tokens."""
    batch, tokens, context, _ = EXAMPLE
    cached = context - tokens
    ids = torch.arange(batch * tokens).remainder(config.vocab_size).reshape(batch, tokens)
    positions = (torch.arange(tokens)[None] + cached).expand(batch, tokens).contiguous()
    return ids, positions, torch.full((batch,), cached)


def _numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32).remainder(7.0).sub(3.0) / 4).reshape(shape).to(dtype)


def _dims(bounds: Bounds) -> tuple[Any, Any, Any]:
    return (
        Dim("B", min=1, max=bounds.max_batch),
        Dim("T", min=1, max=bounds.max_tokens),
        Dim("S", min=1, max=bounds.max_context),
    )
