"""Which fixed shapes does a package hold, and how does a call of another shape run in one of them?

Some toolchains compile fixed shapes only.  A bucket plan declares them: decode buckets of one token a row, prefill
buckets of one row.  A call is padded up to the smallest bucket that covers it and its outputs are cut back, so engine
and step plans do not change, and the bits of a call stay a pure function of its recorded shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.contract import Bounds, Integers
from runtime.backends.errors import BackendRefused, InputRefused

POOL_SLOTS = 8208
"""Slots of a layer that the engine's default scheduling asks for: 512 blocks of 16, and the scratch block."""
EXAMPLE = "decode=1,8,32;tokens=16,64,256;context=64,256,1024"
Inputs = tuple[Integers, Integers, Integers, Integers]
"""Tokens [B,T], positions [B,T], slots [B,S], context lengths [B]."""
Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Logits [B,T,vocab], new keys and new values [layers,B,T,kv width]."""


@dataclass(frozen=True, order=True)
class Bucket:
    """One fixed shape of the functional step."""

    batch: int
    tokens: int
    context: int

    @property
    def name(self) -> str:
        """Name the shape, for files and records."""
        return f"b{self.batch}_t{self.tokens}_s{self.context}"

    @property
    def area(self) -> int:
        """Count pairs of query and key: the measure by which one bucket is smaller than another."""
        return self.batch * self.tokens * (self.context + self.tokens)

    def covers(self, batch: int, tokens: int, context: int) -> bool:
        """Say whether a call of that shape fits."""
        return batch <= self.batch and tokens <= self.tokens and context <= self.context


@dataclass(frozen=True, kw_only=True)
class BucketPlan:
    """Decode buckets (batch, 1, context) and prefill buckets (1, tokens, context), over every declared size."""

    decode: tuple[int, ...]
    """Rows of the decode buckets, ascending."""
    tokens: tuple[int, ...]
    """New tokens of the prefill buckets, ascending."""
    context: tuple[int, ...]
    """Gathered positions of both, ascending."""
    pool: int = POOL_SLOTS
    """Slots a layer of the pool that fixed shapes are compiled for; a smaller pool runs too."""

    def __post_init__(self) -> None:
        for name in ("decode", "tokens", "context"):
            sizes: tuple[int, ...] = getattr(self, name)
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise _bad_plan(f"{name} must be ascending sizes of 1 or more, not {list(sizes)}")
        if self.pool < 2:
            raise _bad_plan(f"pool must be 2 slots or more, not {self.pool}")

    def buckets(self) -> tuple[Bucket, ...]:
        """List every bucket, decode first, each kind from small to large."""
        decode = [Bucket(batch, 1, context) for batch in self.decode for context in self.context]
        prefill = [Bucket(1, tokens, context) for tokens in self.tokens for context in self.context]
        return tuple(dict.fromkeys([*decode, *prefill]))

    def find(self, batch: int, tokens: int, context: int) -> Bucket | None:
        """Give the smallest bucket that covers a shape, or None."""
        fitting = [bucket for bucket in self.buckets() if bucket.covers(batch, tokens, context)]
        return min(fitting, key=lambda bucket: (bucket.area, bucket), default=None)

    def cover(self, batch: int, tokens: int, context: int) -> tuple[Bucket, bool]:
        """Choose the bucket of a call, and whether its rows run one by one in it.

        Raises InputRefused, naming the nearest bucket, where neither the call nor a row of it fits.
        """
        whole = self.find(batch, tokens, context)
        if whole is not None:
            return whole, False
        single = self.find(1, tokens, context) if tokens > 1 else None
        if single is not None:
            return single, True
        nearest = self.nearest(batch, tokens, context)
        raise InputRefused(
            f"no bucket covers a call of {batch} rows, {tokens} tokens and context {context}; "
            f"the nearest is {nearest.name}",
            fix="prepare the package with larger buckets, or lower max_num_seqs or max_num_batched_tokens",
            evidence={
                "input_signature": f"b{batch}_t{tokens}_s{context}",
                "guard": self.text(),
                "nearest_bucket": nearest.name,
            },
        )

    def nearest(self, batch: int, tokens: int, context: int) -> Bucket:
        """Give the bucket that lacks least to cover a shape."""

        def lack(bucket: Bucket) -> tuple[int, int, Bucket]:
            grown = Bucket(max(batch, bucket.batch), max(tokens, bucket.tokens), max(context, bucket.context))
            return grown.area - bucket.area, bucket.area, bucket

        return min(self.buckets(), key=lack)

    def narrow(self, bounds: Bounds) -> Bounds:
        """Give the bounds that the buckets reach; BackendRefused where a bucket is beyond the bounds."""
        reach = {"decode": self.decode[-1], "tokens": self.tokens[-1], "context": self.context[-1]}
        allowed = {"decode": bounds.max_batch, "tokens": bounds.max_tokens, "context": bounds.max_context}
        for name, most in allowed.items():
            if reach[name] > most:
                raise _bad_plan(f"{name}={reach[name]} is beyond the declared bound {most}")
        return Bounds(max_batch=reach["decode"], max_tokens=reach["tokens"], max_context=reach["context"])

    def document(self) -> dict[str, Any]:
        """Write the plan as a manifest holds it."""
        return {
            "decode": list(self.decode),
            "tokens": list(self.tokens),
            "context": list(self.context),
            "pool": self.pool,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> BucketPlan:
        """Read what `document` wrote."""
        return cls(
            decode=tuple(document["decode"]),
            tokens=tuple(document["tokens"]),
            context=tuple(document["context"]),
            pool=document["pool"],
        )

    def text(self) -> str:
        """Write the plan as a person would on the command line."""
        sizes = {name: ",".join(map(str, getattr(self, name))) for name in ("decode", "tokens", "context")}
        return ";".join([*(f"{name}={value}" for name, value in sizes.items()), f"pool={self.pool}"])


def default_plan(bounds: Bounds) -> BucketPlan:
    """Choose few buckets that reach the whole of the bounds: each of them costs compile time."""
    return BucketPlan(
        decode=_upto(bounds.max_batch, 1, 8),
        tokens=_upto(bounds.max_tokens, 32),
        context=_upto(bounds.max_context, 128),
    )


def parse_plan(text: str, bounds: Bounds) -> BucketPlan:
    """Read a plan from `decode=1,8,32;tokens=16,64,256;context=64,256,1024;pool=8208`.

    What is left out, or everything for `default`, is as `default_plan` chooses it.  Raises BackendRefused.
    """
    given: dict[str, Any] = {}
    for part in (piece.strip() for piece in text.split(";") if text.strip() != "default"):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or name not in {field.name for field in fields(BucketPlan)}:
            raise _bad_plan(f"{part!r} is not one of decode=, tokens=, context=, pool=")
        if name in given:
            raise _bad_plan(f"{name} stands twice")
        sizes = [piece.strip() for piece in value.split(",")]
        if not all(size.isascii() and size.isdigit() for size in sizes) or (name == "pool" and len(sizes) != 1):
            raise _bad_plan(f"{part!r} holds something other than {'a whole number' if name == 'pool' else 'sizes'}")
        given[name] = int(sizes[0]) if name == "pool" else tuple(int(size) for size in sizes)
    return BucketPlan(**{**_fields(default_plan(bounds)), **given})


def pad_inputs(bucket: Bucket, inputs: Inputs) -> Inputs:
    """Pad a call up to its bucket as the engine pads: token 0, position 0, slot 0, context length 0 of added rows."""
    tokens, positions, slots, lengths = inputs
    if (*tokens.shape, slots.shape[1]) == (bucket.batch, bucket.tokens, bucket.context):
        return inputs
    return (
        _grown(tokens, (bucket.batch, bucket.tokens)),
        _grown(positions, (bucket.batch, bucket.tokens)),
        _grown(slots, (bucket.batch, bucket.context)),
        _grown(lengths, (bucket.batch,)),
    )


def cut_outputs(outputs: Arrays, batch: int, tokens: int) -> Arrays:
    """Keep the rows and tokens that were asked for."""
    logits, new_k, new_v = outputs
    return logits[:batch, :tokens], new_k[:, :batch, :tokens], new_v[:, :batch, :tokens]


def step_in_buckets(plan: BucketPlan, inputs: Inputs, run: Callable[[Bucket, Inputs], Arrays]) -> Arrays:
    """Run a call in the smallest bucket that covers it, or row by row where only its rows fit.

    run: executes inputs of exactly the bucket's shape and returns logits, new keys and new values of that shape.
    """
    tokens, positions, slots, lengths = inputs
    batch, count = tokens.shape
    bucket, by_rows = plan.cover(batch, count, slots.shape[1])
    if not by_rows:
        return cut_outputs(run(bucket, pad_inputs(bucket, inputs)), batch, count)
    parts: list[Arrays] = []
    for row in range(batch):
        one = slice(row, row + 1)
        alone = (tokens[one], positions[one], slots[one], lengths[one])
        # A backend may hand out its own buffer again in the next call, so each row's outputs are copied.
        outputs = cut_outputs(run(bucket, pad_inputs(bucket, alone)), 1, count)
        parts.append((outputs[0].copy(), outputs[1].copy(), outputs[2].copy()))
    return (
        np.concatenate([part[0] for part in parts], axis=0),
        np.concatenate([part[1] for part in parts], axis=1),
        np.concatenate([part[2] for part in parts], axis=1),
    )


def _grown(array: Integers, shape: tuple[int, ...]) -> Integers:
    grown = np.zeros(shape, dtype=np.int64)
    grown[tuple(slice(0, size) for size in array.shape)] = array
    return grown


def _upto(most: int, *steps: int) -> tuple[int, ...]:
    return (*(step for step in steps if step < most), most)


def _fields(plan: BucketPlan) -> dict[str, Any]:
    return {field.name: getattr(plan, field.name) for field in fields(plan)}


def _bad_plan(reason: str) -> BackendRefused:
    return BackendRefused(
        f"the bucket plan does not hold together: {reason}",
        fix=f"declare it as for example {EXAMPLE}",
        evidence={"validation_output": reason},
    )
