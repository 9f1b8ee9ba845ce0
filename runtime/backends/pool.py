"""Where do keys and values live between steps?  The two flat tables, as torch tensors or as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.backends.contract import Integers
from runtime.backends.errors import CapacityExhausted, InputRefused
from runtime.backends.protocol import Floats, KVPool
from runtime.models.config import ModelConfig
from runtime.models.decoder import PRECISIONS


def check_selection(
    slot_ids: Integers, rows: Integers, columns: Integers, *, shape: tuple[int, ...], slots: int
) -> None:
    """Refuse a write outside the pool or the step's output; fancy indexing would wrap negative indices silently."""
    count = slot_ids.shape
    if not (rows.shape == columns.shape == count and len(count) == 1):
        raise InputRefused(
            "pool write: slot_ids, rows and columns must be one-dimensional and equally long",
            evidence={"slot_ids": list(count), "rows": list(rows.shape), "columns": list(columns.shape)},
        )
    if not count[0]:
        return
    for name, value, most in (("slot_ids", slot_ids, slots), ("rows", rows, shape[1]), ("columns", columns, shape[2])):
        if int(value.astype(np.int64, copy=False).view(np.uint64).max()) >= most:
            raise InputRefused(
                f"pool write: {name} outside 0..{most - 1}",
                evidence={"input": name, "rule": "index range", "expected": f"0..{most - 1}"},
            )


class TorchPool:
    """Tables [layers*slots, kv width] as torch tensors in the executor's precision."""

    def __init__(self, *, num_layers: int, num_slots: int, width: int, dtype: torch.dtype) -> None:
        if num_slots < 1:
            raise InputRefused(f"a pool needs at least one slot, not {num_slots}", evidence={"num_slots": num_slots})
        try:
            self.k = torch.zeros(num_layers * num_slots, width, dtype=dtype)
            self.v = torch.zeros(num_layers * num_slots, width, dtype=dtype)
        except RuntimeError as error:
            raise _no_memory(num_layers * num_slots * width * dtype.itemsize * 2) from error
        self._slots, self._width = num_slots, width
        self._layer_offsets = np.arange(num_layers, dtype=np.int64)[:, None] * num_slots

    @property
    def num_slots(self) -> int:
        """Slots of one layer."""
        return self._slots

    @property
    def nbytes(self) -> int:
        """Bytes of both tables."""
        return self.k.nbytes + self.v.nbytes

    def adopt(self, k: NDArray[Any], v: NDArray[Any]) -> None:
        """Read from now on tables that another process owns and writes; arrays as `hosted_memory.STORED` says."""
        self.k, self.v = (torch.from_numpy(table).view(self.k.dtype) for table in (k, v))

    def write(self, slot_ids: Integers, new_k: Any, new_v: Any, *, rows: Integers, columns: Integers) -> None:
        """Put token (rows[n], columns[n]) of [layers,B,T,width] tensors into slot_ids[n] of every layer."""
        check_selection(slot_ids, rows, columns, shape=tuple(new_k.shape), slots=self._slots)
        layers, batch, tokens, width = new_k.shape
        target = torch.from_numpy((self._layer_offsets + slot_ids).reshape(-1))
        chosen = torch.from_numpy(
            (np.arange(layers, dtype=np.int64)[:, None] * (batch * tokens) + rows * tokens + columns).reshape(-1)
        )
        self.k.index_copy_(0, target, new_k.reshape(-1, width).index_select(0, chosen))
        self.v.index_copy_(0, target, new_v.reshape(-1, width).index_select(0, chosen))

    def read(self, slot_ids: Integers) -> tuple[Floats, Floats]:
        """Copy out float32 [layers,N,width] keys and values."""
        index = torch.from_numpy(self._layer_offsets + slot_ids)
        return self.k[index].float().numpy(), self.v[index].float().numpy()


def torch_pool(pool: KVPool, config: ModelConfig, precision: str) -> TorchPool:
    """Refuse a pool of another kind, precision, depth or width: compiled code would read foreign memory."""
    if (
        not isinstance(pool, TorchPool)
        or pool.k.dtype is not PRECISIONS[precision]
        or tuple(pool.k.shape) != (config.num_layers * pool.num_slots, config.kv_width)
    ):
        raise foreign_pool(pool)
    return pool


def foreign_pool(pool: KVPool) -> InputRefused:
    """Make the refusal of a pool that another executor allocated."""
    return InputRefused(
        "step input pool: not a pool of this executor",
        fix="allocate the pool with new_pool",
        evidence={"input_signature": type(pool).__name__, "guard": "pool kind, precision, depth and width"},
    )


ALIGNMENT = 64
"""Bytes; compiled code may read whole vectors from the start of a buffer, and crashes where it is not aligned."""


def aligned_zeros(rows: int, width: int) -> Floats:
    """Make a zeroed float32 table whose first byte is aligned; NumPy itself promises 16 bytes only."""
    size = rows * width * 4
    held = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -held.ctypes.data % ALIGNMENT
    return held[start : start + size].view(np.float32).reshape(rows, width)


class ArrayPool:
    """Tables [layers*slots, kv width] as float32 NumPy arrays."""

    def __init__(self, *, num_layers: int, num_slots: int, width: int) -> None:
        if num_slots < 1:
            raise InputRefused(f"a pool needs at least one slot, not {num_slots}", evidence={"num_slots": num_slots})
        try:
            self.k = aligned_zeros(num_layers * num_slots, width)
            self.v = aligned_zeros(num_layers * num_slots, width)
        except MemoryError as error:
            raise _no_memory(num_layers * num_slots * width * 8) from error
        self._slots = num_slots
        self._layer_offsets = np.arange(num_layers, dtype=np.int64)[:, None] * num_slots

    @property
    def num_slots(self) -> int:
        """Slots of one layer."""
        return self._slots

    @property
    def nbytes(self) -> int:
        """Bytes of both tables."""
        return self.k.nbytes + self.v.nbytes

    def adopt(self, k: NDArray[Any], v: NDArray[Any]) -> None:
        """Read from now on tables that another process owns and writes; a pool that keeps views makes them again."""
        self.k, self.v = k, v

    def layers(self) -> list[Floats]:
        """View the tables [slots,kv width] of the layers: keys, then values of layer 0, of layer 1, ..."""
        shape = (len(self._layer_offsets), self._slots, -1)
        sides = zip(self.k.reshape(shape), self.v.reshape(shape), strict=True)
        return [table for layer in sides for table in layer]

    def write(self, slot_ids: Integers, new_k: Any, new_v: Any, *, rows: Integers, columns: Integers) -> None:
        """Put token (rows[n], columns[n]) of [layers,B,T,width] arrays into slot_ids[n] of every layer."""
        check_selection(slot_ids, rows, columns, shape=new_k.shape, slots=self._slots)
        target = self._layer_offsets + slot_ids
        self.k[target] = new_k[:, rows, columns]
        self.v[target] = new_v[:, rows, columns]

    def read(self, slot_ids: Integers) -> tuple[Floats, Floats]:
        """Copy out float32 [layers,N,width] keys and values."""
        index = self._layer_offsets + slot_ids
        return self.k[index], self.v[index]


def _no_memory(size: int) -> CapacityExhausted:
    return CapacityExhausted(
        f"no memory for a key-value pool of {size} bytes", fix="lower num_blocks", evidence={"requested_bytes": size}
    )
