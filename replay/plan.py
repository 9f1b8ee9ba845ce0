"""Which level of replay is reachable for a recorded request, and which pin stands in the way of a better one?

    bitwise    every logits row again, to the bit
    token      the same model and sampler, but something that reaches the bits is not as it was
    decision   no model: validators, policies and failure classes over the recorded evidence
    latency    only where the time went
    evidence   only what was written down

The answer is a promise: what it calls reachable must be reached, so anything that is unknown lowers the level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from manifests.hardware import HardwareManifest
from manifests.run import Pins
from replay.records import RecordedRequest

if TYPE_CHECKING:
    from traces.envelope import TraceEvent


class Level(IntEnum):
    """How much of a request can be had again; a larger one includes the smaller ones."""

    EVIDENCE = 0
    LATENCY = 1
    DECISION = 2
    TOKEN = 3
    BITWISE = 4

    @property
    def word(self) -> str:
        """The level as it is written."""
        return self.name.lower()


@dataclass(frozen=True, kw_only=True)
class Missing:
    """One thing that is not as it was.

    pin       `dimension.field`, or what the record lacks: `record.engine_step`, `record.effects`, ...
    recorded  what the recording says
    here      what this machine or ledger has; None where it has nothing
    allows    the best level that is left without it
    fix       what would bring it back; None where nothing can
    """

    pin: str
    recorded: Any
    here: Any
    allows: Level
    fix: str | None = None

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form that `replay check --json` prints."""
        return {
            "pin": self.pin,
            "recorded": self.recorded,
            "here": self.here,
            "allows": self.allows.word,
            "fix": self.fix,
        }


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The promise for one request."""

    level: Level
    missing: tuple[Missing, ...]

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form that `replay check --json` prints."""
        return {"level": self.level.word, "missing": [one.to_document() for one in self.missing]}


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What is here to replay with.

    hardware       this machine, probed as the recording was
    has_package    says why a package cannot be used, or None when its digests are right
    has_tokenizer  whether any package here has the tokenizer that the pins name
    readable       whether evidence is in the ledger, undamaged
    missing_steps  engine steps that a sequence's slice needs and the ledger lacks
    """

    hardware: HardwareManifest
    has_package: Callable[[str], str | None]
    has_tokenizer: Callable[[Pins], bool]
    readable: Callable[[str], bool]
    missing_steps: Callable[[RecordedRequest], tuple[str, ...]]


HARDWARE_BITS = ("cpu_model", "architecture", "isa_flags", "gpu")
"""Hardware fields that reach the bits and cannot be set: threads and environment are set in the worker."""

NUMERIC_LIBRARIES = ("numpy", "onnxruntime", "torch", "mkl", "onednn", "executorch", "iree-base-runtime", "jaxlib")


def assess(request: RecordedRequest, surroundings: Surroundings) -> Reach:
    """Say which level is reachable and list everything that is in the way, worst first."""
    missing = sorted(_missing(request, surroundings), key=lambda one: one.allows)
    return Reach(level=min((one.allows for one in missing), default=Level.BITWISE), missing=tuple(missing))


def _missing(request: RecordedRequest, surroundings: Surroundings) -> Iterator[Missing]:
    if not any(event.duration_us is not None for event in request.events):
        yield Missing(pin="record.stages", recorded=None, here=None, allows=Level.EVIDENCE)
    yield from _missing_record(request, surroundings)
    if request.pins is None:
        if not _refused_early(request):
            yield Missing(pin="record.manifest", recorded=None, here=None, allows=Level.LATENCY)
        return
    if _generated(request):
        yield from _missing_package(request.pins, surroundings)
        yield from hardware_differences(request.pins.hardware, surroundings.hardware)
        for step in surroundings.missing_steps(request):
            fix = "The recorder dropped it under pressure; alone is the best that is left."
            yield Missing(pin="record.engine_step", recorded=step, here=None, allows=Level.TOKEN, fix=fix)


def _missing_record(request: RecordedRequest, surroundings: Surroundings) -> Iterator[Missing]:
    """Look for the envelope, the end, and the evidence that effects and stages name."""
    accepted, terminal = request.accepted, request.terminal
    if accepted is None or request.envelope is None:
        yield Missing(pin="record.envelope", recorded=None, here=None, allows=Level.LATENCY)
    if terminal is None:
        fix = "The run died before the request ended: nothing says what it would have answered."
        yield Missing(pin="record.terminal", recorded=None, here=None, allows=Level.LATENCY, fix=fix)
    for name, references in (("effects", _effect_references(request.events)), ("stages", _stage_references(request))):
        gone = [reference for reference in references if not surroundings.readable(reference)]
        if gone:
            yield Missing(
                pin=f"record.{name}",
                recorded=gone[0],
                here=f"{len(gone)} documents erased or damaged",
                allows=Level.LATENCY if name == "effects" else Level.DECISION,
                fix="Restore the blobs from a copy of the ledger.",
            )


def _missing_package(pins: Pins, surroundings: Surroundings) -> Iterator[Missing]:
    """Look for the prepared package that the request ran on."""
    package = pins.artifact.package_digest
    if package is None:
        yield Missing(pin="artifact.package_digest", recorded=None, here=None, allows=Level.LATENCY)
        return
    reason = surroundings.has_package(package)
    if reason is not None:
        yield Missing(
            pin="artifact.package_digest",
            recorded=package,
            here=reason,
            allows=Level.DECISION if surroundings.has_tokenizer(pins) else Level.LATENCY,
            fix=f"Prepare it again: replaylab prepare MODEL --backend {pins.compiler.backend} "
            f"--precision {pins.compiler.precision}",
        )


def hardware_differences(recorded: HardwareManifest, here: HardwareManifest) -> Iterator[Missing]:
    """List what reaches the bits, is different here, and cannot be set in a worker process."""
    for field in HARDWARE_BITS:
        before, now = getattr(recorded, field), getattr(here, field)
        if before != now:
            yield Missing(
                pin=f"hardware.{field}",
                recorded=_short(before, now),
                here=_short(now, before),
                allows=Level.TOKEN,
                fix="Replay on the machine that recorded it, or one like it.",
            )
    if recorded.threads > here.cores:
        yield Missing(pin="hardware.threads", recorded=recorded.threads, here=here.cores, allows=Level.TOKEN)
    yield from _library_differences(recorded.library_versions, here.library_versions)


def _library_differences(recorded: Mapping[str, str], here: Mapping[str, str]) -> Iterator[Missing]:
    for name in NUMERIC_LIBRARIES:
        before, now = recorded.get(name), here.get(name)
        if before is not None and before != now:
            yield Missing(
                pin=f"hardware.library_versions.{name}",
                recorded=before,
                here=now,
                allows=Level.TOKEN,
                fix=f"Install {name} {before}.",
            )


def _generated(request: RecordedRequest) -> bool:
    """Tell whether a model ran for this request."""
    return any(event.event_type == "engine.sequence" for event in request.events) or any(
        event.stage is not None and event.stage.value in ("b05", "b06") for event in request.events
    )


def _refused_early(request: RecordedRequest) -> bool:
    """Tell whether the request ended before any package could be pinned to it."""
    return request.terminal is not None and request.terminal.failure_class is not None and not _generated(request)


def _effect_references(events: Iterable[TraceEvent]) -> set[str]:
    effects = [event for event in events if event.event_type == "effect.performed"]
    return {reference for event in effects for reference in (event.input_ref, event.result_ref) if reference}


def _stage_references(request: RecordedRequest) -> set[str]:
    return {
        reference
        for event in request.events
        if event.event_type in ("stage.started", "stage.completed", "engine.sequence")
        for reference in (event.input_ref, event.result_ref)
        if reference
    }


def _short(value: Any, other: Any) -> Any:
    """Return what is in one tuple and not in the other, or the value itself."""
    if isinstance(value, tuple) and isinstance(other, tuple):
        only = sorted(set(value) - set(other))
        return only or f"{len(value)} flags"
    return value
