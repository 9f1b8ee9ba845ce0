"""What does `--set` change in a preparation?  Each setting is one choice that the nine stages were given.

compiler.backend, compiler.precision (or artifact.quantization), compiler.optimization_level,
compiler.execution_providers=A,B, compiler.flags.NAME, compiler.buckets=PLAN, compiler.bounds.max_batch (max_tokens,
max_context), hardware.threads, and versions of a toolchain: compiler.onnxruntime, compiler.torch, ...
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from replay.errors import PinRefused
from replay.substitutes import VERSIONED, Substitution, Way, parse_settings, way_of
from traces.failures import ClassifiedError

if TYPE_CHECKING:
    from replay.preparations import RecordedPreparation
    from runtime.backends.buckets import BucketPlan
    from runtime.backends.protocol import BuildOptions

BOUNDS, FLAGS, BUCKETS = "compiler.bounds.", "compiler.flags.", "compiler.buckets"
BOUND_NAMES = ("max_batch", "max_tokens", "max_context")
SETTABLE = (
    "compiler.backend",
    "compiler.precision",
    "artifact.quantization",
    "compiler.optimization_level",
    "compiler.batch_invariant",
    "compiler.execution_providers",
    "compiler.flags.NAME",
    BUCKETS,
    *(f"{BOUNDS}{name}" for name in BOUND_NAMES),
    "hardware.threads",
    *(f"compiler.{name}" for name in VERSIONED),
)


def parse_choices(settings: Sequence[str]) -> tuple[Substitution, ...]:
    """Read the `--set` options for a preparation; PinRefused names the first that is none of its choices."""
    return parse_settings(settings, _way)


def change_options(backend: str, options: BuildOptions, choices: Iterable[Substitution]) -> tuple[str, BuildOptions]:
    """Return backend and options with the choices made; PinRefused for a value that cannot be read.

    Another backend starts from its own level, flags and providers: those of the first one mean nothing to it.
    """
    chosen = tuple(choices)
    other = next((one.value for one in chosen if one.pin == "compiler.backend"), backend)
    if other != backend:
        options = replace(options, optimization="default", flags={}, providers=(), buckets=None)
    for one in chosen:
        options = _with(options, one)
    return other, options


def _with(options: BuildOptions, one: Substitution) -> BuildOptions:
    if one.pin.startswith(FLAGS):
        name = one.pin.removeprefix(FLAGS).removeprefix("session.")
        if name == "norm":
            return replace(options, norm=one.value)
        return replace(options, flags={**options.flags, name: one.value})
    if one.pin.startswith(BOUNDS):
        bound = {one.pin.removeprefix(BOUNDS): _whole(one)}
        return replace(options, bounds=replace(options.bounds, **bound))
    match one.pin:
        case "compiler.precision":
            return replace(options, precision=one.value)
        case "artifact.quantization":
            return replace(options, precision="float32" if one.value == "none" else one.value)
        case "compiler.buckets":
            return replace(options, buckets=_plan(options, one))
        case "compiler.batch_invariant":
            return replace(options, batch_invariant=one.value == "true")
        case "compiler.optimization_level":
            return replace(options, optimization=one.value)
        case "compiler.execution_providers":
            return replace(options, providers=tuple(filter(None, (word.strip() for word in one.value.split(",")))))
        case "hardware.threads":
            return replace(options, threads=_whole(one))
        case _:
            return options


def _plan(options: BuildOptions, one: Substitution) -> BucketPlan | None:
    from runtime.backends.buckets import parse_plan

    if one.value == "none":
        return None
    try:
        return parse_plan(one.value, options.bounds)
    except ClassifiedError as error:
        raise PinRefused(error.message, pin=one.pin, fix=error.fix) from error


def _way(pin: str) -> Way:
    if pin == BUCKETS or (pin.startswith(BOUNDS) and pin.removeprefix(BOUNDS) in BOUND_NAMES):
        return Way.PACKAGE
    try:
        way = way_of(pin)
    except PinRefused:
        way = None
    preparing = way in (Way.PACKAGE, Way.VERSION) and pin != "artifact.package_digest"
    if way is not None and (preparing or pin == "hardware.threads"):
        return way
    raise PinRefused("is no choice of a preparation", pin=pin, fix=f"Its choices are {', '.join(SETTABLE)}.")


def _whole(one: Substitution) -> int:
    try:
        value = int(one.value)
    except ValueError:
        value = 0
    if value < 1:
        raise PinRefused(f"{one.value!r} is not a whole number above 0", pin=one.pin)
    return value


def recorded_value(original: RecordedPreparation, pin: str) -> Any:
    """Return what a preparation was recorded with for one of the settable pins; None where it names nothing."""
    options = original.options
    if pin.startswith(FLAGS):
        name = pin.removeprefix(FLAGS).removeprefix("session.")
        return options["norm"] if name == "norm" else options["flags"].get(name)
    if pin.startswith(BOUNDS):
        symbol = {"max_batch": "B", "max_tokens": "T", "max_context": "S"}[pin.removeprefix(BOUNDS)]
        return options["symbols"][symbol][1]
    name = pin.removeprefix("compiler.")
    if name in VERSIONED and original.manifest is not None:
        versions = original.manifest.compiler.runtime_versions
        return ", ".join(versions[part] for part in VERSIONED[name] if part in versions) or None
    precision = options["precision"]
    return {
        "compiler.backend": original.backend,
        "compiler.precision": precision,
        "artifact.quantization": "none" if precision == "float32" else precision,
        "compiler.optimization_level": options["optimization"],
        "compiler.execution_providers": options["providers"],
        "compiler.batch_invariant": bool(options.get("batch_invariant")),
        BUCKETS: options.get("buckets"),
        "hardware.threads": options["threads"],
    }.get(pin)
