"""How do the public traces of other serving systems become requests of the size this model can take?

Azure LLM inference traces (CSV: TIMESTAMP, ContextTokens, GeneratedTokens; Patel et al., ISCA 2024) and Mooncake
traces (JSON Lines: timestamp in ms, input_length, output_length, hash_ids of 512-token prefix blocks; Qin et al.,
FAST 2025) give lengths and times, no text.  The tokens are made here: a prefix block of the trace is always the same
tokens, in every process, so that requests that shared a prefix there share one here.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.errors import WorkloadError
from experiments.workloads import (
    Workload,
    WorkloadFormat,
    WorkloadRequest,
    numbered_lines,
    parse_object,
    read_jsonl,
)

MOONCAKE_BLOCK_TOKENS = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, kw_only=True)
class TraceScale:
    """How a trace made for a large model is shrunk.

    prompt_tokens  no request asks more than this; longer ones lose their tail, so shared prefixes stay shared
    output_tokens  no request generates more than this
    block_tokens   tokens that stand for one prefix block of the trace
    time_factor    arrival times are multiplied by this (0.1: ten times faster)
    tenants        requests are dealt to these tenants by a stable hash
    token_range    the made-up tokens are drawn from [first, second): ids that the model knows and no special token
    """

    prompt_tokens: int = 96
    output_tokens: int = 48
    block_tokens: int = 16
    time_factor: float = 1.0
    tenants: tuple[str, ...] = ("acme",)
    token_range: tuple[int, int] = (64, 512)


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace, in the trace's own sizes; blocks are the ids of its prefix blocks."""

    at_us: int
    input_tokens: int
    output_tokens: int
    blocks: tuple[str, ...]


def read_workload(path: Path, *, layout: WorkloadFormat = "auto", scale: TraceScale | None = None) -> Workload:
    """Read a workload of any known layout; `auto` looks at the first line."""
    chosen = detect_layout(path) if layout == "auto" else layout
    if chosen == "jsonl":
        return read_jsonl(path)
    rows = read_azure(path) if chosen == "azure" else read_mooncake(path)
    return scale_rows(path.stem, rows, scale=scale or TraceScale(), spread=chosen == "mooncake")


def detect_layout(path: Path) -> WorkloadFormat:
    """Say which layout a file has, from its first line."""
    for number, text in numbered_lines(path):
        if text.lstrip().startswith("{"):
            return "mooncake" if "input_length" in parse_object(path, number, text) else "jsonl"
        if text.startswith("TIMESTAMP"):
            return "azure"
        raise WorkloadError(
            "is neither JSON Lines nor an Azure trace", path=path, line=number, fix="Name the layout with --format."
        )
    raise WorkloadError("is empty", path=path, fix="Give a file with one request a line.")


def read_azure(path: Path) -> list[TraceRow]:
    """Read an Azure LLM inference trace; times count from its first request."""
    lines = list(numbered_lines(path))
    header = next(csv.reader([lines[0][1]])) if lines else []
    missing = [name for name in AZURE_COLUMNS if name not in header]
    if missing:
        raise WorkloadError(
            f"column {missing[0]!r} is missing", path=path, line=1, fix=f"Needs {', '.join(AZURE_COLUMNS)}."
        )
    rows: list[TraceRow] = []
    first: datetime | None = None
    for number, text in lines[1:]:
        cells = dict(zip(header, next(csv.reader([text])), strict=False))
        moment = _azure_time(path, number, cells.get("TIMESTAMP", ""))
        first = first or moment
        length = _count(path, number, "ContextTokens", cells.get("ContextTokens"))
        rows.append(
            TraceRow(
                at_us=(moment - first) // timedelta(microseconds=1),
                input_tokens=length,
                output_tokens=_count(path, number, "GeneratedTokens", cells.get("GeneratedTokens")),
                blocks=tuple(f"azure:{number}:{index}" for index in range(-(-length // MOONCAKE_BLOCK_TOKENS))),
            )
        )
    return _in_order(path, rows)


def read_mooncake(path: Path) -> list[TraceRow]:
    """Read a Mooncake trace: milliseconds, lengths and the ids of its 512-token prefix blocks."""
    rows: list[TraceRow] = []
    for number, text in numbered_lines(path):
        line = parse_object(path, number, text)
        for name in ("timestamp", "input_length", "output_length", "hash_ids"):
            if name not in line:
                raise WorkloadError(f"field {name!r} is missing", path=path, line=number)
        if not isinstance(line["hash_ids"], list):
            raise WorkloadError("'hash_ids' must be a list of block ids", path=path, line=number)
        rows.append(
            TraceRow(
                at_us=1000 * _count(path, number, "timestamp", line["timestamp"]),
                input_tokens=_count(path, number, "input_length", line["input_length"]),
                output_tokens=_count(path, number, "output_length", line["output_length"]),
                blocks=tuple(f"mooncake:{identity}" for identity in line["hash_ids"]),
            )
        )
    return _in_order(path, rows)


def scale_rows(name: str, rows: list[TraceRow], *, scale: TraceScale, spread: bool) -> Workload:
    """Turn the rows of a trace into requests this model can take, and say in notes what was done to them."""
    factor = scale.block_tokens / MOONCAKE_BLOCK_TOKENS
    times = spread_bins([row.at_us for row in rows]) if spread else [row.at_us for row in rows]
    requests: list[WorkloadRequest] = []
    capped = 0
    for index, (row, at_us) in enumerate(zip(rows, times, strict=True)):
        prompt = max(1, round(row.input_tokens * factor))
        output = max(1, round(row.output_tokens * factor))
        capped += prompt > scale.prompt_tokens or output > scale.output_tokens
        requests.append(
            WorkloadRequest(
                at_us=round(at_us * scale.time_factor),
                tenant=scale.tenants[_stable(f"{name}:{index}") % len(scale.tenants)],
                prompt_tokens=_prompt(row.blocks, min(prompt, scale.prompt_tokens), scale),
                generation={"max_tokens": min(output, scale.output_tokens), "seed": index},
            )
        )
    notes = [f"lengths x {factor:.4g}", f"{capped} of {len(rows)} requests capped"]
    if spread:
        notes.append("arrivals that share a time stamp are spread up to the next one")
    return Workload(name=name, items=tuple(requests), notes=tuple(notes))


def spread_bins(times: list[int]) -> list[int]:
    """Spread arrivals that share a stamp evenly up to the next stamp: the trace rounds them to bins of seconds."""
    stamps = sorted(set(times))
    width = {here: there - here for here, there in pairwise(stamps)}
    sizes = _sizes(times)
    seen: dict[int, int] = {}
    spread: list[int] = []
    for at_us in times:
        place = seen.get(at_us, 0)
        seen[at_us] = place + 1
        spread.append(at_us + place * width.get(at_us, 0) // sizes[at_us])
    return spread


def block_content(block: str, count: int, *, token_range: tuple[int, int]) -> tuple[int, ...]:
    """Return the `count` tokens that stand for a block: the same in every process."""
    first, end = token_range
    return tuple(first + _stable(f"{block}:{index}") % (end - first) for index in range(count))


def _prompt(blocks: tuple[str, ...], tokens: int, scale: TraceScale) -> tuple[int, ...]:
    """Return a prompt of `tokens` tokens, made of its blocks in order, cut at the tail."""
    prompt: list[int] = []
    for block in blocks or ("empty",):
        size = min(scale.block_tokens, tokens - len(prompt))
        if size <= 0:
            break
        prompt.extend(block_content(block, size, token_range=scale.token_range))
    return tuple(prompt)


def _stable(text: str) -> int:
    """Hash text to 64 bits the same way in every process (the builtin hash is seeded anew in each)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _sizes(times: Iterable[int]) -> dict[int, int]:
    """Count how often each time stands."""
    sizes: dict[int, int] = {}
    for at_us in times:
        sizes[at_us] = sizes.get(at_us, 0) + 1
    return sizes


def _azure_time(path: Path, number: int, text: str) -> datetime:
    """Read a stamp with up to seven decimals of a second, of which six are kept."""
    head, _, decimals = text.strip().partition(".")
    try:
        return datetime.fromisoformat(f"{head}.{(decimals or '0')[:6].ljust(6, '0')}")
    except ValueError:
        raise WorkloadError(f"TIMESTAMP {text!r} is not a time", path=path, line=number) from None


def _count(path: Path, number: int, name: str, value: Any) -> int:
    """Read a whole number from zero up."""
    try:
        whole = int(value) if isinstance(value, str) else value
    except ValueError:
        whole = None
    if isinstance(whole, bool) or not isinstance(whole, int) or whole < 0:
        raise WorkloadError(
            f"{name!r} must be a whole number from zero up, not {json.dumps(value)}", path=path, line=number
        )
    return whole


def _in_order(path: Path, rows: list[TraceRow]) -> list[TraceRow]:
    """Return the rows by time, from zero; refuse a trace without rows."""
    if not rows:
        raise WorkloadError("has no request", path=path)
    ordered = sorted(rows, key=lambda row: row.at_us)
    start = ordered[0].at_us
    return [TraceRow(row.at_us - start, row.input_tokens, row.output_tokens, row.blocks) for row in ordered]
