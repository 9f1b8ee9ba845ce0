"""On what do a row's bits depend in this executor?  A small probe over batch, padding and chunks, with a control."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from runtime.backends.contract import Integers
from runtime.backends.fixture import fixture_tokens
from runtime.backends.protocol import Executor, Floats, KVPool

BATCHES = (2, 11)
PROMPT, PADDING = 100, 28
"""Tokens of the needle's prompt (shorter ones hide that padding matters), and unused slots added to its context."""


def probe_invariance(executor: Executor) -> dict[str, Any]:
    """Compare one row's logits alone with the same row in other company, bit for bit.

    Returns, per axis, "equal" or "differs" (or "not tried" where the bounds do not allow it): `repeat`, `batch` (decode
    among 2 and 11 rows), `padding` (28 more unused context slots), `chunks` (prompt in two chunks instead of one),
    `prefill` (last prompt token decoded instead of prefilled).  `control` runs a float32 linear layer that the default
    MKL kernels answer differently in a batch: "equal" there means either a strict setting or a blind probe.
    """
    bounds = executor.contract.bounds
    prompt = min(PROMPT, bounds.max_tokens, executor.contract.max_positions // 2, bounds.max_context // 2)
    half = prompt // 2
    pool = executor.new_pool(4 * prompt)
    tokens = fixture_tokens("needle", prompt + 1, executor.config.vocab_size)
    whole = _feed(executor, pool, tokens[:prompt], (prompt,), first_slot=0)
    alone = _decode(executor, pool, tokens[prompt], prompt, batch=1, padded=prompt)
    again = _decode(executor, pool, tokens[prompt], prompt, batch=1, padded=prompt)
    batches = [size for size in BATCHES if size <= bounds.max_batch]
    grouped = [_decode(executor, pool, tokens[prompt], prompt, batch=size, padded=prompt) for size in batches]
    chunked = _feed(executor, pool, tokens[:prompt], (half, prompt - half), first_slot=prompt)
    stepped = _feed(executor, pool, tokens[:prompt], (prompt - 1, 1), first_slot=2 * prompt)
    wide = min(prompt + PADDING, bounds.max_context)
    padded = _decode(executor, pool, tokens[prompt], prompt, batch=1, padded=wide)
    return {
        "repeat": _verdict([alone], again),
        "batch": _verdict(grouped, alone) if grouped else "not tried",
        "padding": _verdict([padded], alone) if wide > prompt else "not tried",
        "chunks": _verdict([chunked], whole),
        "prefill": _verdict([stepped], whole),
        "control": _control(),
    }


def _feed(executor: Executor, pool: KVPool, tokens: Integers, chunks: tuple[int, ...], *, first_slot: int) -> Floats:
    """Prefill one row in chunks into its own slots; returns the logits of the last token."""
    done = 0
    logits: Floats = np.zeros(0, dtype=np.float32)
    for size in (chunk for chunk in chunks if chunk):
        slots = np.arange(first_slot, first_slot + max(done, 1), dtype=np.int64).reshape(1, -1)
        out = executor.step(
            tokens[None, done : done + size].copy(),
            np.arange(done, done + size, dtype=np.int64).reshape(1, size),
            slots,
            np.array([done], dtype=np.int64),
            pool,
        )
        columns = np.arange(size, dtype=np.int64)
        pool.write(first_slot + done + columns, out.new_k, out.new_v, rows=np.zeros_like(columns), columns=columns)
        logits = np.array(out.logits[0, -1])
        done += size
    return logits


def _decode(executor: Executor, pool: KVPool, token: int, length: int, *, batch: int, padded: int) -> Floats:
    """Decode the needle as the last of `batch` rows; its neighbours are other tokens over the same context."""
    others = fixture_tokens("neighbour", batch - 1, executor.config.vocab_size) if batch > 1 else np.zeros(0, np.int64)
    slots = np.zeros((batch, padded), dtype=np.int64)
    slots[:, :length] = np.arange(length)
    out = executor.step(
        np.append(others, token).astype(np.int64).reshape(batch, 1),
        np.full((batch, 1), length, dtype=np.int64),
        slots,
        np.full(batch, length, dtype=np.int64),
        pool,
    )
    return np.array(out.logits[-1, 0])


def _verdict(found: list[Floats], reference: Floats) -> str:
    return "equal" if all(np.array_equal(entry, reference) for entry in found) else "differs"


def _control() -> str:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(11, 256, generator=generator), torch.randn(768, 256, generator=generator)
    together = torch.nn.functional.linear(rows, weight)
    return "equal" if torch.equal(together[:1], torch.nn.functional.linear(rows[:1], weight)) else "differs"
