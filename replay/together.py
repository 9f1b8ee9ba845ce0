"""Can all generations of a replayed run be computed at once?  Every recorded call once, with real rows, where it can.

Only for who replays a whole run under its own pins: then all its tenants' prompts are in one batch, as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manifests.scheduling import SchedulingManifest
from replay.generations import RecordedSequence, load_sequences
from replay.models import Models
from replay.records import RecordedRequest
from runtime.engine.generation import GenerationResult
from runtime.engine.plan import StepPlan
from traces.failures import ClassifiedError

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger


@dataclass(kw_only=True)
class _Engine:
    """One recorded engine: what ran on it, and under which packages and rules."""

    packages: set[str] = field(default_factory=set[str])
    rules: dict[str, SchedulingManifest] = field(default_factory=dict[str, SchedulingManifest])
    sequences: list[RecordedSequence] = field(default_factory=list[RecordedSequence])


def play_together(
    ledger: Ledger,
    requests: Iterable[RecordedRequest],
    models: Models,
    plans: Mapping[str, Sequence[StepPlan]],
) -> tuple[dict[str, GenerationResult], int]:
    """Return the results of all generations that could be computed together, by sequence id, and the calls it took.

    What is missing runs from its slice: an engine of which a step was lost, or that changed its package under way, and
    a generation that went on past its recording.  Raises the errors of loading a package.
    """
    from runtime.engine.ensemble import Ensemble

    found: dict[str, GenerationResult] = {}
    calls = 0
    for engine_id, engine in _engines(ledger, requests).items():
        if len(engine.packages) != 1 or len(engine.rules) != 1:
            continue
        model = models.load(*engine.packages)
        (rules,) = engine.rules.values()
        members = {
            one.index: (one.request, one.result)
            for one in engine.sequences
            if one.request is not None and one.result is not None
        }
        try:
            ensemble = Ensemble(model.executor, model.tokenizer, rules, members)
            results = ensemble.play(plans.get(engine_id, ()))
        except ClassifiedError:
            continue  # each request will meet what stands in the way by itself, and be told so by name
        calls += ensemble.calls
        found |= {result.sequence_id: result for result in results.values()}
    return found, calls


def _engines(ledger: Ledger, requests: Iterable[RecordedRequest]) -> dict[str, _Engine]:
    engines: dict[str, _Engine] = {}
    for request in requests:
        if request.pins is None or request.pins.artifact.package_digest is None:
            continue
        for sequence in load_sequences(ledger, request.events):
            engine = engines.setdefault(sequence.engine_id, _Engine())
            engine.packages.add(request.pins.artifact.package_digest)
            engine.rules[request.pins.scheduling.digest] = request.pins.scheduling
            engine.sequences.append(sequence)
    return engines
