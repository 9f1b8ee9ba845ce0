"""What does `--set dimension.field=value` change, and how is it brought about?

Every pin falls into one of the ways below, or is refused by name: a replay never runs under pins it cannot honour.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from manifests.diff import diff
from manifests.errors import ManifestError
from manifests.run import Pins, parse_setting
from replay.errors import PinRefused


class Way(StrEnum):
    """How a changed pin is brought about."""

    PACKAGE = "package"
    """Another prepared package of the same model runs."""
    VERSION = "version"
    """The worker runs in an environment of its own that has this version of a library."""
    WORKER = "worker"
    """The worker process starts with another environment or number of threads."""
    RESCHEDULE = "reschedule"
    """The recorded plans do not fit other rules: the request is scheduled anew, alone."""
    REPIN = "repin"
    """The request path reads its settings from the changed pins."""
    RETRIEVAL = "retrieval"
    """Retrieval runs again on another index."""
    TOOL_RESULT = "tool_result"
    """A tool call is answered with the given result instead of the recorded one."""


TOOL_RESULT = "tools.result."

VERSIONED: dict[str, tuple[str, ...]] = {
    "executorch": ("executorch",),
    "iree": ("iree-base-compiler", "iree-base-runtime"),
    "jax": ("jax", "jaxlib"),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime",),
    "onnxscript": ("onnxscript",),
    "torch": ("torch",),
}
"""`compiler.NAME=VERSION`: what of a toolchain can run in another version, and the distributions that make it up."""

_WAYS: dict[str, Way] = {
    "artifact.package_digest": Way.PACKAGE,
    "artifact.quantization": Way.PACKAGE,
    "compiler.backend": Way.PACKAGE,
    "compiler.precision": Way.PACKAGE,
    "compiler.optimization_level": Way.PACKAGE,
    "compiler.flags": Way.PACKAGE,
    "compiler.execution_providers": Way.PACKAGE,
    "compiler.batch_invariant": Way.PACKAGE,
    "hardware.threads": Way.WORKER,
    "hardware.environment": Way.WORKER,
    "generation.seed": Way.REPIN,
    "generation.temperature": Way.REPIN,
    "generation.top_k": Way.REPIN,
    "generation.top_p": Way.REPIN,
    "generation.max_tokens": Way.REPIN,
    "context.index_digest": Way.RETRIEVAL,
    "context.token_budget": Way.REPIN,
    "policy.policy_version": Way.REPIN,
    "policy.thresholds": Way.REPIN,
    "policy.repair_limit": Way.REPIN,
}

_REASONS = {
    "artifact": "the model is the recorded one; a replay can only run another package of it",
    "compiler": "this follows from how the package was prepared",
    "hardware": "this machine is what it is",
    "scheduling": "this names the engine, it does not steer it",
    "generation": "this is decided by the runtime's code or by the output contract",
    "context": "this is a result of retrieval or decided by the runtime's code",
    "tools": "tool servers are not started in a replay: calls are answered from the record",
    "policy": "this is decided by the runtime's code",
}

_FIXES = {
    "artifact": "Set artifact.package_digest to a package that `replaylab packages list` shows.",
    "compiler": "Set compiler.backend, compiler.precision, compiler.optimization_level, compiler.execution_providers, "
    f"compiler.flags.NAME, or a version: {', '.join(f'compiler.{name}' for name in VERSIONED)}.",
    "hardware": "Set hardware.threads or hardware.environment.NAME.",
    "scheduling": "Set another scheduling field.",
    "generation": "Set seed, temperature, top_k, top_p or max_tokens.",
    "context": "Set context.index_digest to the path of another index, or context.token_budget.",
    "tools": 'Give a result instead: --set tools.result.TOOL_NAME=\'{"field": "value"}\'.',
    "policy": "Set policy_version, thresholds.NAME or repair_limit.",
}


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """One pin that the caller sets.

    pin     `dimension.field`, `dimension.field.key`, or `tools.result.TOOL_NAME`
    value   as it was written; the field's own type decides how it is read
    """

    pin: str
    value: str
    way: Way

    @property
    def setting(self) -> str:
        """The same as it is written on the command line."""
        return f"{self.pin}={self.value}"

    @property
    def paths(self) -> tuple[str, ...]:
        """The fields of the pins that it sets: a library's version is one of `compiler.runtime_versions`."""
        if self.way is not Way.VERSION:
            return (self.pin,)
        return tuple(f"compiler.runtime_versions.{name}" for name in VERSIONED[self.pin.removeprefix("compiler.")])


def parse_substitutions(settings: Sequence[str]) -> tuple[Substitution, ...]:
    """Read the `--set` options of a request's replay in order; PinRefused names the first that cannot be had."""
    return parse_settings(settings, way_of)


def parse_settings(settings: Sequence[str], way: Callable[[str], Way]) -> tuple[Substitution, ...]:
    """Read `--set` options in order; PinRefused for what is no setting, is set twice, or has no `way`."""
    found: list[Substitution] = []
    for setting in settings:
        try:
            pin, value = parse_setting(setting)
        except ManifestError as error:
            raise PinRefused("this is not a setting", pin=setting, fix=error.fix) from None
        if any(earlier.pin == pin for earlier in found):
            raise PinRefused("is set twice", pin=pin, fix="Give each pin one value.")
        found.append(Substitution(pin=pin, value=value, way=way(pin)))
    return tuple(found)


def way_of(pin: str) -> Way:
    """Say how a pin is brought about; PinRefused says why it cannot be."""
    if pin.startswith(TOOL_RESULT) and len(pin) > len(TOOL_RESULT):
        return Way.TOOL_RESULT
    dimension, _, rest = pin.partition(".")
    field = f"{dimension}.{rest.partition('.')[0]}"
    if field in _WAYS:
        return _WAYS[field]
    if dimension == "compiler" and rest in VERSIONED:
        return Way.VERSION
    if dimension == "scheduling" and rest and rest != "engine_id":
        return Way.RESCHEDULE
    if dimension not in _REASONS:
        raise PinRefused("there is no such dimension", pin=pin, fix=f"The dimensions are {', '.join(_REASONS)}.")
    raise PinRefused(f"cannot be set in a replay: {_REASONS[dimension]}", pin=pin, fix=_FIXES[dimension])


def apply_to_pins(pins: Pins, substitutions: Iterable[Substitution], *, ways: frozenset[Way] | None = None) -> Pins:
    """Return the pins with the substitutions made; PinRefused names the one whose value does not fit.

    Retrieval and tool results are not values of a manifest field and are left out; `ways` picks the others.
    """
    for substitution in substitutions:
        if substitution.way in (Way.RETRIEVAL, Way.TOOL_RESULT) or (ways is not None and substitution.way not in ways):
            continue
        try:
            for path in substitution.paths:
                pins = pins.set_text(path, substitution.value)
        except ManifestError as error:
            message = str(error).removeprefix(f"{substitution.pin}: ").split(". ")[0]
            raise PinRefused(message, pin=substitution.pin, fix=error.fix) from None
    return pins


def check_values(pins: Pins | None, substitutions: Iterable[Substitution]) -> None:
    """Refuse a value that its pin does not take, before anything runs; pins are None where none was ever known."""
    chosen = tuple(substitutions)
    if pins is not None:
        apply_to_pins(pins, chosen)
    for substitution in chosen:
        if substitution.way is Way.TOOL_RESULT:
            tool_result(substitution)


def tool_result(substitution: Substitution) -> tuple[str, Any]:
    """Return the tool's name and the JSON result that stands in for the recorded one."""
    name = substitution.pin.removeprefix(TOOL_RESULT)
    try:
        return name, json.loads(substitution.value)
    except ValueError as error:
        raise PinRefused(
            f"the value is not JSON: {error}",
            pin=substitution.pin,
            fix='Quote it for the shell: \'{"field": "value"}\'',
        ) from None


OBSERVED = frozenset({"context.context_digest", "context.source_snapshots"})
"""Pins that are observations of a run: they follow from the others and are never set."""


def pin_changes(
    original: Pins | None, replay: Pins | None, substitutions: Iterable[Substitution]
) -> tuple[dict[str, Any], ...]:
    """List every pin that is not the same in the replay as {"pin", "original", "replay", "set"}.

    `set` tells what the caller asked for from what follows from it (another backend has other versions).
    """
    chosen = tuple(substitutions)
    found: list[dict[str, Any]] = []
    if original is not None and replay is not None:
        for difference in diff(original, replay):
            if not any(difference.path.startswith(pin) for pin in OBSERVED):
                paths = [path for one in chosen for path in one.paths]
                asked = any(difference.path == path or difference.path.startswith(f"{path}.") for path in paths)
                change = {"pin": difference.path, "original": difference.left, "replay": difference.right}
                found.append(change | {"set": asked})
    results = (one for one in chosen if one.way is Way.TOOL_RESULT)
    found.extend({"pin": one.pin, "original": "as recorded", "replay": one.value, "set": True} for one in results)
    return tuple(sorted(found, key=lambda change: not change["set"]))
