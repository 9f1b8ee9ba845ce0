"""What do the engine's process and a backend's child both see?  Unnamed shared memory, and where a step lies in it.

The memory has no name (`memfd_create`), so nothing is left behind however a process ends.  The parent owns it; a child
gets descriptors over its socket and maps the key-value tables read-only: whatever goes wrong in it, it cannot write
into another request's cache.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import weakref
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.backends.contract import Integers
from runtime.backends.errors import BackendRefused, CapacityExhausted, InputRefused
from runtime.backends.pool import check_selection
from runtime.backends.protocol import Floats
from runtime.models.config import ModelConfig

STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}
"""How a cache's numbers lie in memory; NumPy has no bfloat16, so those are kept as their bits."""
_ALIGNMENT = 64


class SharedBlock:
    """A growable piece of memory that another process can map by its descriptor."""

    def __init__(self, label: str, size: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise BackendRefused(
                f"hosting a backend in its own process needs memfd_create, which {sys.platform} lacks",
                fix="load the package without isolation",
                evidence={"runtime_version": sys.platform},
            )
        self._descriptor = os.memfd_create(f"replaylab-{label}", os.MFD_CLOEXEC)
        self._release = weakref.finalize(self, os.close, self._descriptor)
        self._map: mmap.mmap | None = None
        self.size = 0
        self.grow(size)

    @property
    def memory(self) -> Any:
        """The mapped bytes; another object after every growth."""
        return self._map

    def grow(self, size: int) -> bool:
        """Make room for `size` bytes, and tell whether the memory was mapped anew; arrays given out stay valid."""
        if size <= self.size:
            return False
        wanted = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            os.ftruncate(self._descriptor, wanted)
            self._map = mmap.mmap(self._descriptor, wanted)
        except (OSError, ValueError, OverflowError) as error:
            raise CapacityExhausted(
                f"no memory for {wanted} shared bytes",
                fix="lower num_blocks or the package's bounds",
                evidence={"memory_pressure": str(error), "reservation_failure": f"{wanted} bytes"},
            ) from error
        self.size = wanted
        return True

    def descriptor(self) -> int:
        """Give the descriptor to be sent to the child."""
        return self._descriptor

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """View a part of the memory."""
        count = math.prod(shape)
        return np.frombuffer(self._map, dtype=dtype, count=count, offset=offset).reshape(shape)  # type: ignore[arg-type]

    def close(self) -> None:
        """Give up the descriptor; the memory goes when the last mapping does."""
        self._release()
        self._map = None


class Place(NamedTuple):
    """Where one array of a step lies."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


class StepLayout:
    """Where a step's four inputs and three outputs lie in the shared arena; both sides compute it from the shapes."""

    def __init__(self, shape: tuple[int, int, int], *, config: ModelConfig, stored: str) -> None:
        batch, tokens, context = shape
        number, table = np.dtype(np.int64), STORED[stored]
        cached = (config.num_layers, batch, tokens, config.kv_width)
        self._end = 0
        self.inputs = (
            self._put(number, (batch, tokens)),
            self._put(number, (batch, tokens)),
            self._put(number, (batch, context)),
            self._put(number, (batch,)),
        )
        logits = self._put(np.dtype(np.float32), (batch, tokens, config.vocab_size))
        self.outputs = (logits, self._put(table, cached), self._put(table, cached))

    @property
    def size(self) -> int:
        """Bytes that the arena must have."""
        return self._end

    def _put(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Place:
        place = Place(dtype, shape, self._end)
        used = math.prod(shape) * dtype.itemsize
        self._end += -(-used // _ALIGNMENT) * _ALIGNMENT
        return place


class StepViews:
    """A step's arrays in mapped memory by shape; shapes are few, because a pin declares them."""

    MOST = 512

    def __init__(self, *, config: ModelConfig, stored: str) -> None:
        self._config, self._stored = config, stored
        self._layouts: dict[tuple[int, int, int], StepLayout] = {}
        self._views: dict[tuple[int, int, int], list[NDArray[Any]]] = {}

    def layout(self, shape: tuple[int, int, int]) -> StepLayout:
        """Give the layout of a shape."""
        found = self._layouts.get(shape)
        if found is None:
            if len(self._layouts) >= self.MOST:
                self._layouts.clear()
                self._views.clear()
            found = self._layouts[shape] = StepLayout(shape, config=self._config, stored=self._stored)
        return found

    def forget(self) -> None:
        """Drop the views: the memory was mapped anew."""
        self._views.clear()

    def arrays(self, shape: tuple[int, int, int], memory: Any) -> list[NDArray[Any]]:
        """Give the four inputs and the three outputs of a shape, as views of `memory`."""
        found = self._views.get(shape)
        if found is None:
            layout = self.layout(shape)
            places = (*layout.inputs, *layout.outputs)
            found = self._views[shape] = [
                np.ndarray(place.shape, place.dtype, memory, place.offset) for place in places
            ]
        return found


class HostedPool:
    """Keys and values in memory that the parent owns: a child that dies takes nothing of it along."""

    def __init__(self, number: int, num_slots: int, *, config: ModelConfig, stored: str) -> None:
        if num_slots < 1:
            raise InputRefused(f"a pool needs at least one slot, not {num_slots}", evidence={"num_slots": num_slots})
        self.number, self._slots, self._stored = number, num_slots, stored
        shape = (config.num_layers * num_slots, config.kv_width)
        self.shape, dtype = shape, STORED[stored]
        size = shape[0] * shape[1] * dtype.itemsize
        self.blocks = (SharedBlock(f"k{number}", size), SharedBlock(f"v{number}", size))
        self._k, self._v = (block.array(dtype, shape) for block in self.blocks)
        self._offsets = np.arange(config.num_layers, dtype=np.int64)[:, None] * num_slots

    @property
    def num_slots(self) -> int:
        """Slots of one layer."""
        return self._slots

    @property
    def nbytes(self) -> int:
        """Bytes of both tables."""
        return self._k.nbytes + self._v.nbytes

    def write(self, slot_ids: Integers, new_k: Any, new_v: Any, *, rows: Integers, columns: Integers) -> None:
        """Put token (rows[n], columns[n]) of [layers,B,T,width] arrays into slot_ids[n] of every layer."""
        check_selection(slot_ids, rows, columns, shape=new_k.shape, slots=self._slots)
        target = self._offsets + slot_ids
        self._k[target] = new_k[:, rows, columns]
        self._v[target] = new_v[:, rows, columns]

    def read(self, slot_ids: Integers) -> tuple[Floats, Floats]:
        """Copy out float32 [layers,N,width] keys and values."""
        index = self._offsets + slot_ids
        return self._numbers(self._k[index]), self._numbers(self._v[index])

    def _numbers(self, values: NDArray[Any]) -> Floats:
        if self._stored == "float32":
            return values
        return (values.astype(np.uint32) << 16).view(np.float32)  # a bfloat16 is the upper half of a float32
