"""A numpy executor whose bits behave like real kernels': a row depends on its own context and on the padded shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.contract import Bounds, InputContract
from runtime.backends.protocol import StepOutput
from runtime.models.config import ModelConfig

WIDTH = 4


class ToyPool:
    """Keys only; a slot holds WIDTH numbers."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.nbytes = num_slots * WIDTH * 4
        self.table = np.zeros((num_slots, WIDTH), dtype=np.float32)

    def write(self, slot_ids: Any, new_k: Any, new_v: Any, *, rows: Any, columns: Any) -> None:
        """Put the chosen tokens away."""
        self.table[slot_ids] = new_k[0, rows, columns]

    def read(self, slot_ids: Any) -> Any:
        """Copy out."""
        return self.table[slot_ids], self.table[slot_ids]


@dataclass
class ToyExecutor:
    """Logits from a running sum over the context, scaled by a factor that depends on the padded shape."""

    vocab_size: int = 50
    max_positions: int = 256
    fail_on: int | None = None
    """Raise whenever this token is fed."""
    spoil_on: int | None = None
    """Answer what is no number, keys included, in every row that is fed this token, and from there on."""

    backend = "toy"
    precision = "float32"
    threads = 1

    def __post_init__(self) -> None:
        self.config = ModelConfig(
            family="llama",
            vocab_size=self.vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=WIDTH,
            max_positions=self.max_positions,
        )
        self.contract = InputContract.of(
            self.config, Bounds(max_batch=64, max_tokens=128, max_context=self.max_positions)
        )
        self.calls = 0
        random = np.random.default_rng(7)
        self.embedding = random.standard_normal((self.vocab_size, WIDTH)).astype(np.float32)
        self.head = random.standard_normal((WIDTH, self.vocab_size)).astype(np.float32)

    def new_pool(self, num_slots: int) -> ToyPool:
        """Zeroed."""
        return ToyPool(num_slots)

    def step(
        self, tokens: Any, positions: Any, slots: Any, context_lengths: Any, pool: ToyPool, *, last: Any = None
    ) -> StepOutput:
        """Run one functional step."""
        self.contract.check(tokens, positions, slots, context_lengths, num_slots=pool.num_slots, last=last)
        if self.fail_on is not None and (tokens == self.fail_on).any():
            raise RuntimeError("planted failure")
        self.calls += 1
        batch, width = tokens.shape
        # A kernel choice by shape: the same numbers, summed with another rounding.
        scale = np.float32(1 + 1e-6 * (batch + 3 * width + slots.shape[1] // 64))
        seen = np.arange(slots.shape[1])[None, :] < context_lengths[:, None]
        past: NDArray[np.float32] = (pool.table[slots] * seen[..., None]).sum(axis=1)
        keys = np.sin(self.embedding[tokens] + positions[..., None].astype(np.float32) * np.float32(0.1)) * scale
        state = np.cumsum(keys, axis=1, dtype=np.float32) + past[:, None]
        if self.spoil_on is not None:
            keys[np.cumsum(tokens == self.spoil_on, axis=1) > 0] = np.nan
            state = np.cumsum(keys, axis=1, dtype=np.float32) + past[:, None]
        new = (keys + np.float32(0.01) * np.tanh(state)).astype(np.float32)
        if last is not None:
            state = state[np.arange(batch), last][:, None]
        logits = (np.tanh(state * scale) @ self.head).astype(np.float32)
        return StepOutput(logits, new[None], new[None])

    def close(self) -> None:
        """Nothing to release."""


class ListRecorder:
    """Keeps events in memory."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self.blobs: dict[str, bytes] = {}

    def emit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> bool:
        """Keep an event."""
        self.events.append((event_type, payload or {}, columns))
        return True

    def put_blob(self, data: bytes) -> str:
        """Keep evidence."""
        name = f"evidence://{len(self.blobs)}"
        self.blobs[name] = data
        return name


@dataclass
class ToyModel:
    """A loaded package, as far as the engine looks."""

    executor: Any
    tokenizer: Any = None
