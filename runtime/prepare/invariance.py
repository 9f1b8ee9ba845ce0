"""On what do a row's bits depend in this executor?  A probe over batch, place, padding, chunks and recomputation.

An axis is `equal` or `differs` with the number of rows that do, or `not tried` with the reason.  All rows are compared
bit for bit.  Two controls show that the probe can see: settings of the plain torch kernels that are known to vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from runtime.backends.contract import Integers
from runtime.backends.fixture import fixture_tokens
from runtime.backends.linears import mkl_is_strict
from runtime.backends.protocol import Executor, Floats, KVPool

AXES = ("repeat", "batch", "padding", "chunks", "prefill", "recompute")
BATCHES = (2, 11, 16, 33, 63)
"""16 hides what depends on a row's place; 33 and 63 show it."""
NEEDLES = 4
"""Rows that are looked for in every batch, at changing places."""
PROMPT, LONG, DECODED = 64, 100, 8
"""Tokens of the chunked prompt, of the padded one (shorter ones hide that padding matters), and decoded after it."""


@dataclass
class Tally:
    """Rows compared and rows that differed, by axis."""

    compared: dict[str, int] = field(default_factory=dict[str, int])
    differing: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, axis: str, found: Floats, reference: Floats) -> None:
        """Compare rows [n, vocabulary] bit for bit."""
        unlike = (found != reference).any(axis=1)
        self.compared[axis] = self.compared.get(axis, 0) + len(unlike)
        self.differing[axis] = self.differing.get(axis, 0) + int(unlike.sum())

    def verdicts(self) -> dict[str, str]:
        """Say of every axis whether bits depend on it."""
        return {
            axis: "not tried" if axis not in self.compared else ("differs" if self.differing[axis] else "equal")
            for axis in AXES
        }

    def counts(self) -> dict[str, str]:
        """Give differing of compared rows, by axis tried."""
        return {axis: f"{self.differing[axis]}/{self.compared[axis]}" for axis in AXES if axis in self.compared}


def probe_invariance(executor: Executor) -> dict[str, Any]:
    """Compare rows alone with the same rows in other company, bit for bit.

    Returns, per axis, "equal", "differs" or "not tried" (where the bounds do not allow it): `repeat`; `batch` (decode
    among 2 to 63 rows, at changing places); `padding` (unused context slots); `chunks` (a prompt in pieces);
    `prefill` (its last token decoded); `recompute` (what was decoded, computed again as one prefill, as after a
    preemption).  `rows` holds differing of compared rows.  `control` is "differs" where plain torch kernels show the
    probe a difference, "equal" where it would be blind.
    """
    session = _Session(executor)
    tally = Tally()
    session.batches(tally)
    session.paddings(tally)
    session.chunks(tally)
    return {**tally.verdicts(), "control": _control(), "rows": tally.counts()}


class _Session:
    """One pool, one prompt, and the calls that the axes need."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        bounds = executor.contract.bounds
        self.bounds = bounds
        self.vocab_size = executor.config.vocab_size
        # The prompt and what is decoded after it are one prefill of the recompute axis.
        self.whole = min(PROMPT, bounds.max_tokens, bounds.max_context, executor.contract.max_positions)
        self.long = min(LONG, bounds.max_context, executor.contract.max_positions - 1)
        self.pool = executor.new_pool(4 * max(self.whole, self.long) + 1)
        self.tokens = fixture_tokens("needle", max(self.whole, self.long) + NEEDLES, self.vocab_size)

    def batches(self, tally: Tally) -> None:
        """Decode the needles alone, again, and as rows of batches."""
        length = self.whole - 1
        self.feed([length], first_slot=0)
        needles = self.tokens[-NEEDLES:]
        alone = np.concatenate([self.decode(needles[n : n + 1], length, padded=length) for n in range(NEEDLES)])
        again = np.concatenate([self.decode(needles[n : n + 1], length, padded=length) for n in range(NEEDLES)])
        tally.add("repeat", again, alone)
        for size in (size for size in BATCHES if size <= self.bounds.max_batch):
            row_tokens = fixture_tokens(f"neighbours {size}", size, self.vocab_size)
            count = min(NEEDLES, size)
            rows = np.linspace(size - 1, 0, count).astype(np.int64)  # last, first and between
            row_tokens[rows] = needles[:count]
            tally.add("batch", self.decode(row_tokens, length, padded=length)[rows], alone[:count])

    def paddings(self, tally: Tally) -> None:
        """Decode over a long prompt with more and more unused context slots."""
        most = self.bounds.max_tokens
        self.feed([most] * (self.long // most) + [self.long % most], first_slot=0)
        one = self.tokens[-1:]
        reference = self.decode(one, self.long, padded=self.long)
        wider = {min(self.long + more, self.bounds.max_context) for more in (4, 28, 64)} - {self.long}
        for padded in sorted(wider):
            tally.add("padding", self.decode(one, self.long, padded=padded), reference)

    def chunks(self, tally: Tally) -> None:
        """Compute one prompt whole, in pieces, and token by token; compare every token's row."""
        whole, room = self.whole, max(self.whole, self.long)
        if whole < 4:
            return
        reference = self.feed([whole], first_slot=0)
        for first in {whole // 4, whole // 2 + 1}:
            tally.add("chunks", self.feed([first, whole - first], first_slot=room), reference)
        stepped = self.feed([whole - 1, 1], first_slot=2 * room)
        tally.add("prefill", stepped[-1:], reference[-1:])
        decoded = min(DECODED, whole // 2)
        again = self.feed([whole - decoded] + [1] * decoded, first_slot=3 * room)
        tally.add("recompute", again[-decoded:], reference[-decoded:])
        if whole < min(self.bounds.max_context, self.executor.contract.max_positions):
            later = [self.decode(self.tokens[-1:], whole, padded=whole, first_slot=first) for first in (3 * room, 0)]
            tally.add("recompute", *later)

    def feed(self, sizes: Sequence[int], *, first_slot: int) -> Floats:
        """Prefill one row in chunks into its own slots; returns the logits of every token."""
        done = 0
        rows: list[Floats] = []
        for size in (size for size in sizes if size):
            slots = np.arange(first_slot, first_slot + max(done, 1), dtype=np.int64).reshape(1, -1)
            out = self.executor.step(
                self.tokens[None, done : done + size].copy(),
                np.arange(done, done + size, dtype=np.int64).reshape(1, size),
                slots,
                np.array([done], dtype=np.int64),
                self.pool,
            )
            _keep(self.pool, first_slot + done, size, out.new_k, out.new_v)
            rows.append(np.array(out.logits[0]))
            done += size
        return np.concatenate(rows)

    def decode(self, tokens: Integers, length: int, *, padded: int, first_slot: int = 0) -> Floats:
        """Decode one token a row, all over the same context."""
        batch = len(tokens)
        slots = np.zeros((batch, padded), dtype=np.int64)
        slots[:, :length] = np.arange(first_slot, first_slot + length)
        out = self.executor.step(
            tokens.reshape(batch, 1).copy(),
            np.full((batch, 1), length, dtype=np.int64),
            slots,
            np.full(batch, length, dtype=np.int64),
            self.pool,
        )
        return np.array(out.logits[:, 0])


def _keep(pool: KVPool, first_slot: int, size: int, new_k: Any, new_v: Any) -> None:
    columns = np.arange(size, dtype=np.int64)
    pool.write(first_slot + columns, new_k, new_v, rows=np.zeros_like(columns), columns=columns)


def _control() -> str:
    """Run what is known to vary: MKL's linear layers by rows (unless it is strict), attention by unused columns."""
    return "differs" if not mkl_is_strict() or _attention_varies() else "equal"


def _attention_varies() -> bool:
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(1, 4, 1, 64, generator=generator), torch.randn(1, 4, 128, 64, generator=generator)
    attend = torch.nn.functional.scaled_dot_product_attention
    answers = [
        attend(query, keys[:, :, :width], keys[:, :, :width], attn_mask=(torch.arange(width) < 100)[None, None, None])
        for width in (100, 104, 113)
    ]
    return not all(torch.equal(answers[0], other) for other in answers[1:])
