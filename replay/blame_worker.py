"""How does a worker process search for what in the schedule changed a request?  `python -m replay.blame_worker`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from replay.blame import Blame, Culprit, Search, Unresolved
from replay.blame_job import BlameJob
from replay.errors import IncompleteRecord
from replay.generations import RecordedSequence, load_sequences
from replay.jobs import Report
from replay.neighbours import Neighbours
from replay.records import RecordedRequest, load_request
from replay.slices import SlicePlans
from replay.worker import serve, threads_of
from runtime.engine.plan import SequenceEntry

if TYPE_CHECKING:
    from runtime.engine.edited_replays import EditedReplays
    from runtime.engine.generation import TokenRecord
    from runtime.engine.plan_edits import Shape
    from traces.ledger.ledger import Ledger

Say = Callable[[Report], None]


def main() -> int:
    """Read one job from standard input, run it, report on standard output."""
    return serve(lambda line, say: run_blame(BlameJob.decode(line), say))


def run_blame(job: BlameJob, say: Say) -> None:
    """Search the generations of one request, reporting each finding.

    Raises IncompleteRecord when the record lacks what the search needs, PinRefused when the package is gone.
    """
    from replay.models import Models
    from traces.ledger.ledger import Ledger

    ledger = Ledger(job.ledger)
    ledger.drain()
    request = load_request(ledger, job.run_id, job.request)
    models = Models(
        job.ledger,
        threads=threads_of([request]),
        plans={},
        sequences={},
        on_loading=lambda package: say(Report(kind="loading", body={"package": package})),
    )
    chosen = _chosen(ledger, request, job.generation)
    for number, sequence in chosen:
        replays = _replays(ledger, request, sequence, models, say)
        recorded = () if sequence.result is None else sequence.result.records
        blame = Search(replays, recorded, max_replays=job.max_replays).run()
        neighbours = Neighbours(ledger, job.run_id, sequence.engine_id, tenant=_tenant(request))
        found = {"generation": number, "sequence": sequence.sequence_id} | describe(blame, neighbours)
        last = bool(blame.findings) or number == chosen[-1][0]
        if last and recorded and (job.samples or job.arrivals):
            found |= _around(job, ledger, request, sequence, replays, neighbours, say)
        say(Report(kind="found", body=found))
        if blame.findings:
            return


def _chosen(ledger: Ledger, request: RecordedRequest, generation: int | None) -> list[tuple[int, RecordedSequence]]:
    """Return the generations to search, with their numbers from 1."""
    numbered = list(enumerate(load_sequences(ledger, request.events), start=1))
    wanted = [one for one in numbered if generation is None or one[0] == generation]
    if not wanted:
        raise IncompleteRecord(
            f"the request has {len(numbered)} recorded generations"
            + ("" if generation is None else f", not a generation {generation}"),
            missing="engine.sequence",
            fix="Only a request for which a model ran can be blamed on its schedule: replay show ID",
        )
    return wanted


def _replays(
    ledger: Ledger, request: RecordedRequest, sequence: RecordedSequence, models: Any, say: Say
) -> EditedReplays:
    """Load the package and the slice of one generation."""
    from runtime.engine.edited_replays import EditedReplays

    pins = request.pins
    if pins is None or pins.artifact.package_digest is None:
        raise IncompleteRecord("the request's pins name no package", missing="request.manifest")
    if sequence.request is None or sequence.result is None:
        raise IncompleteRecord(
            f"the prompt or the end of generation {sequence.sequence_id} is not recorded", missing="engine.sequence"
        )
    slices = SlicePlans(ledger, request.run_id, sequence.engine_id)
    slices.add(sequence)
    model = models.load(pins.artifact.package_digest)
    return EditedReplays(
        model.executor,
        model.tokenizer,
        pins.scheduling,
        slices.plans.values(),
        [SequenceEntry(sequence.index, sequence.sequence_id, request.request_ref)],
        sequence.request,
        on_replay=lambda count: say(Report(kind="progress", body={"replays": count})),
    )


def _around(
    job: BlameJob,
    ledger: Ledger,
    request: RecordedRequest,
    sequence: RecordedSequence,
    replays: EditedReplays,
    neighbours: Neighbours,
    say: Say,
) -> dict[str, Any]:
    """Replay one generation under other arrivals: each moved by one step, and all of them jittered."""
    from replay.arrivals import load_history
    from replay.replanning import Replanner
    from replay.sensitivity import measure, shift_arrivals

    recorded = () if sequence.result is None else sequence.result.records
    before, size = replays.count, replays.settings.block_size
    history = load_history(ledger, job.run_id, sequence.engine_id, own=_tenant(request), block_size=size)
    replanner = Replanner(replays, history, sequence.index, recorded)
    found: dict[str, Any] = {}
    if job.arrivals:
        plan = replays.recorded_plan(len(recorded))
        beside = {row.sequence for seat in plan.seats for row in plan.company(seat)}
        shifts = shift_arrivals(replanner, beside)
        found["arrivals"] = {
            "faithful": replanner.faithful,
            "shifts": [asdict(one) | {"who": _who(one.sequence, sequence, neighbours)} for one in shifts],
        }
    if job.samples:
        found["sensitivity"] = asdict(
            measure(
                replanner,
                jitter=job.jitter,
                samples=job.samples,
                seed=job.seed,
                on_sample=lambda count: say(Report(kind="progress", body={"samples": count, "replays": replays.count})),
            )
        )
    return found | {"replays_around": replays.count - before}


def _who(index: int, sequence: RecordedSequence, neighbours: Neighbours) -> dict[str, Any] | None:
    """Name a neighbour; None is the request itself."""
    return None if index == sequence.index else neighbours.name(index)


def describe(blame: Blame, neighbours: Neighbours) -> dict[str, Any]:
    """Return a search's result as JSON."""
    return {
        "tokens": blame.tokens,
        "edits": blame.edits,
        "replays": blame.replays,
        "findings": [_finding(one, neighbours) for one in blame.findings],
    }


def _finding(found: Culprit | Unresolved, neighbours: Neighbours) -> dict[str, Any]:
    if isinstance(found, Unresolved):
        return {"resolved": False} | asdict(found)
    change, edit = found.change, found.change.edit
    neighbour = None
    if edit.sequence is not None:
        neighbour = neighbours.name(edit.sequence) | {"joined": neighbours.joined(edit.sequence, edit.step)}
    return {
        "resolved": True,
        "layer": found.layer,
        "token_index": found.token_index,
        "step": found.step,
        "edit": {"kind": edit.kind, "step": edit.step, "neighbour": neighbour, "chunk_end": edit.end},
        "before": _shape(change.before),
        "after": _shape(change.after),
        "edits_before": found.edits_before,
        "edits_after": found.edits_after,
        "recorded": _token(found.recorded),
        "other": None if found.other is None else _token(found.other),
        "repeated": found.repeated,
        "by_itself": found.by_itself,
    }


def _shape(shape: Shape | None) -> Mapping[str, Any] | None:
    return None if shape is None else asdict(shape)


def _token(record: TokenRecord) -> dict[str, Any]:
    margin = None if record.margin is None else repr(record.margin)
    return {"token": record.token, "margin": margin, "logits_digest": record.logits_digest}


def _tenant(request: RecordedRequest) -> str | None:
    """Return the tenant of a request as the ledger writes it."""
    return next((event.tenant_ref for event in request.events if event.event_type == "engine.sequence"), None)


if __name__ == "__main__":
    raise SystemExit(main())
