"""Which ONNX operators do the decoder's own ones become?  Those that ONNX has for them, each with its opset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript.values import Opset

OPSETS = {"gathered": 23, "resident": 24}
"""By form of the step.  23 is the first with RMS norm and attention as operators of their own, a third fewer nodes than
opset 18; 24 the first that can put columns into a table in place."""
_RESIDENT: Any = Opset("", OPSETS["resident"])


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Give the exporter's table for the operators of `runtime.models.resident`, which must have been imported."""
    own = torch.ops.replaylab
    return {
        own.put_columns.default: _put_columns,
        own.attend_columns.default: _attend_columns,
        own.pick_tokens.default: _pick_tokens,
    }


def _put_columns(table: Any, values: Any, starts: Any) -> Any:
    return _RESIDENT.TensorScatter(table, values, starts, mode="linear", axis=1)


def _attend_columns(queries: Any, keys: Any, values: Any, mask: Any, heads: int, kv_heads: int) -> Any:
    answered, *_ = _RESIDENT.Attention(queries, keys, values, mask, q_num_heads=heads, kv_num_heads=kv_heads, scale=1.0)
    return answered


def _pick_tokens(x: Any, wanted: Any) -> Any:
    return _RESIDENT.GatherND(x, wanted, batch_dims=1)
