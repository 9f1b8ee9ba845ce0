"""Stage 1: how does a model become a captured program?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.backends.buckets import BucketPlan
from runtime.backends.contract import Bounds
from runtime.backends.errors import BackendRefused
from runtime.backends.protocol import Backend, BuildOptions, Lowering
from runtime.models.config import read_config
from runtime.models.source import kind_of
from runtime.prepare.stage import StageOutcome


@dataclass(frozen=True)
class Source:
    """Receives: a model, the backend and what is asked of it."""

    model_folder: Path
    """A checkpoint's folder, a saved program, an ONNX file, or a folder with one of these."""
    model_digest: str
    backend: Backend
    options: BuildOptions
    work: Path
    """Scratch folder of this preparation; its place is no part of anything recorded."""
    resources: ExitStack
    """What must be released when the preparation ends, however it ends."""

    def document(self) -> Mapping[str, Any]:
        """Name the source by digest and options, never by where it lies."""
        return {"model": self.model_digest, "backend": self.backend.name, "options": options_document(self.options)}


@dataclass(frozen=True)
class Captured:
    """Emits: a program representation suitable for analysis, held by the backend's lowering."""

    source: Source
    lowering: Lowering
    emitted: Mapping[str, Any]

    def document(self) -> Mapping[str, Any]:
        """Describe what was captured."""
        return self.emitted


def run(source: Source) -> StageOutcome[Captured]:
    """Capture the model through the backend's lowering, which later stages carry on."""
    lowering = source.backend.start(source.model_folder, source.work, source.options)
    source.resources.callback(lowering.close)
    boundary = lowering.capture()
    return StageOutcome(Captured(source, lowering, boundary.emitted), boundary.record)


def check_reach(model: Path, bounds: Mapping[str, int]) -> None:
    """Refuse bounds that somebody asked for and no sequence of the model can reach.

    Defaults are not asked for: they may be beyond a small model.  A one-shot model has no positions.
    """
    asked = {name: value for name, value in bounds.items() if name in ("max_tokens", "max_context")}
    if not asked or kind_of(model)[0].one_shot:
        return
    most = read_config(model).max_positions
    for name, value in asked.items():
        if value > most:
            raise BackendRefused(
                f"{name} {value} is out of reach: the model has {most} positions",
                fix=f"give {most} or less",
                evidence={"validation_output": f"{name} <= {value}, at most {most}"},
            )


def read_options(document: Mapping[str, Any]) -> BuildOptions:
    """Read what `options_document` wrote, to prepare in the same way again."""
    symbols = document["symbols"]
    return BuildOptions(
        precision=document["precision"],
        norm=document["norm"],
        optimization=document["optimization"],
        flags=dict(document["flags"]),
        providers=tuple(document["providers"]),
        bounds=Bounds(max_batch=symbols["B"][1], max_tokens=symbols["T"][1], max_context=symbols["S"][1]),
        threads=document["threads"],
        buckets=BucketPlan.from_document(document["buckets"]) if document.get("buckets") else None,
        batch_invariant=document.get("batch_invariant", False),
    )


def options_document(options: BuildOptions) -> dict[str, Any]:
    """Write options as a manifest holds them; the deadline is no identity."""
    return {
        "precision": options.precision,
        "norm": options.norm,
        "optimization": options.optimization,
        "flags": dict(options.flags),
        "providers": list(options.providers),
        "symbols": options.bounds.symbols(),
        "threads": options.threads,
        **({"buckets": options.buckets.document()} if options.buckets else {}),
        "batch_invariant": options.batch_invariant,
    }
