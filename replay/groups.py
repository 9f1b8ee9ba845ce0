"""Which requests can share a worker?  Those that want the same environment and the same number of threads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from manifests.hardware import HardwareManifest
from replay.jobs import THREADS_VARIABLE
from replay.records import RecordedRequest
from replay.substitutes import Substitution, Way, apply_to_pins
from runtime.probe import pinned_environment, probe


@dataclass(frozen=True, kw_only=True)
class Group:
    """Requests of one run that one worker runs.

    environment  the worker's whole environment, numeric settings as recorded or as they were set
    """

    requests: tuple[str, ...]
    environment: Mapping[str, str]


def group_requests(requests: Sequence[RecordedRequest], substitutions: Iterable[Substitution]) -> list[Group]:
    """Group requests by the environment that their hardware pins, changed as asked, want of a worker."""
    chosen = tuple(substitutions)
    grouped: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for request in requests:
        environment = worker_environment(request, chosen)
        grouped.setdefault(tuple(sorted(environment.items())), []).append(request.request_ref)
    return [Group(requests=tuple(found), environment=dict(variables)) for variables, found in grouped.items()]


def worker_environment(request: RecordedRequest, substitutions: Sequence[Substitution]) -> dict[str, str]:
    """Return the environment for a request's worker; PinRefused when a value does not fit its pin."""
    hardware = _hardware(request, substitutions)
    return pinned_environment(hardware) | {THREADS_VARIABLE: str(hardware.threads)}


def _hardware(request: RecordedRequest, substitutions: Sequence[Substitution]) -> HardwareManifest:
    if request.pins is None:  # refused before any pin was known: nothing numeric will run
        return probe()
    return apply_to_pins(request.pins, substitutions, ways=frozenset({Way.WORKER})).hardware
