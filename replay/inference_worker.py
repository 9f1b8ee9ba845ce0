"""Does a one-shot package give the same bits again?  `python -m replay.inference_worker`, under recorded settings.

Each request is computed at its recorded place of a call of the recorded shape, among stand-ins; or, `alone`, in a call
of its own, which shows what the batch changed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from replay.errors import IncompleteRecord, PinRefused
from replay.inferences import RecordedInference, RecordedInferences, load_inferences
from replay.jobs import THREADS_VARIABLE, Job, Report
from replay.launch import run_job
from replay.plan import hardware_differences
from replay.verdict import ReplayVerdict, Verdict, tally
from replay.worker import Say, serve, started, without_comparison
from traces.failures import ClassifiedError

if TYPE_CHECKING:
    from manifests.hardware import HardwareManifest
    from runtime.prepare.one_shot import OneShotPackage
    from traces.ledger.ledger import Ledger
    from traces.recorder import Recorder

COMMAND = (sys.executable, "-m", "replay.inference_worker")


def replay_inferences(
    ledger: Ledger, recorded: RecordedInferences, job: Job
) -> Iterator[tuple[str, int, ReplayVerdict]]:
    """Run a job in workers that have the recorded numeric settings; yield (request, repeat, verdict)."""
    from runtime.probe import pinned_environment

    hardware = hardware_or_refusal(recorded)
    environment = pinned_environment(hardware) | {THREADS_VARIABLE: str(hardware.threads)}
    yield from run_job(replace(job, ledger=ledger.path), environment=environment, command=COMMAND)


def hardware_or_refusal(recorded: RecordedInferences) -> HardwareManifest:
    """Return what a run ran on; IncompleteRecord where nothing says it, as its bits hang on it."""
    if recorded.hardware is None:
        raise IncompleteRecord(
            f"run {recorded.run_id} does not say what it ran on",
            missing="hardware",
            fix="Answer the request again: replaylab infer",
        )
    return recorded.hardware


def run_inferences(job: Job, say: Say) -> None:
    """Replay every request of the job into one child run, reporting each verdict."""
    from runtime.probe import probe
    from traces.ledger.ledger import Ledger
    from traces.recorder import Recorder, random_ids

    ledger = Ledger(job.ledger)
    ledger.drain()
    recorded = load_inferences(ledger, job.run_id)
    here = probe(threads=hardware_or_refusal(recorded).threads)
    with Recorder(job.ledger, run_id=f"run_{random_ids()}", component="replay") as recorder:
        reference = recorder.put_blob(here.canonical())
        recorder.commit("run.started", payload=started(job) | {"of": "inference"}, track="B", input_ref=reference)
        model = _load(job, recorded)
        verdicts: list[ReplayVerdict] = []
        for request in job.requests:
            say(Report(kind="begun", body={"request": request}))
            verdict = _judged(ledger, recorded, request, model, job.mode, here=here, child=recorder.run_id)
            _record(recorder, request, verdict)
            verdicts.append(verdict)
            say(Report(kind="verdict", body={"request": request, "verdict": verdict.to_document()}))
        recorder.commit("run.completed", payload={"verdicts": tally(verdicts)}, track="B", status="ok")


def _load(job: Job, recorded: RecordedInferences) -> OneShotPackage | PinRefused:
    """Verify and load the recorded package; what stands in the way is every request's verdict."""
    from runtime.prepare.load import load_one_shot
    from runtime.prepare.store import PackageStore

    try:
        threads = hardware_or_refusal(recorded).threads
        return load_one_shot(PackageStore(job.ledger), recorded.package, threads=threads)
    except ClassifiedError as error:
        return PinRefused(error.message, pin="artifact.package_digest", fix=error.fix)


def _judged(
    ledger: Ledger,
    recorded: RecordedInferences,
    reference: str,
    model: OneShotPackage | PinRefused,
    mode: str,
    *,
    here: HardwareManifest,
    child: str,
) -> ReplayVerdict:
    try:
        if isinstance(model, PinRefused):
            raise model
        request = recorded.requests.get(reference)
        if request is None:
            raise IncompleteRecord(f"run {recorded.run_id} has no request {reference}", missing="request")
        verdict = _compared(ledger, recorded.run_id, request, model, mode, child=child)
    except ClassifiedError as error:
        return without_comparison(error, recorded.run_id, reference, child)
    changes = [
        {"pin": one.pin, "original": one.recorded, "replay": one.here, "set": False}
        for one in hardware_differences(hardware_or_refusal(recorded), here)
    ]
    verdict = verdict.under_changes(changes)
    explains = tuple(str(change["pin"]) for change in changes) if verdict.verdict is Verdict.DIVERGED else ()
    return replace(verdict, suspects=explains)


def _compared(
    ledger: Ledger, run_id: str, request: RecordedInference, model: OneShotPackage, mode: str, *, child: str
) -> ReplayVerdict:
    """Compute a request again and hold its outputs' digests against the recorded ones."""
    from runtime.backends.one_shot import array_digest

    original = {"run": run_id} | request.to_document()
    replay: dict[str, Any] = {"run": child, "mode": mode, "status": "ok", "outputs": {}}
    if request.batch is None or request.status not in ("ok", "error"):
        detail = f"it ended as {request.status} without an answer, so there are no outputs to compare"
        return ReplayVerdict(verdict=Verdict.UNVERIFIED, original=original, replay=replay, detail=detail)
    try:
        outputs = _outputs(ledger, request, model, mode)
    except IncompleteRecord:
        raise
    except Exception as error:  # whatever a backend raises, as the engine has it
        return _failed_again(request, error, original, replay)
    replay["outputs"] = {name: array_digest(value) for name, value in sorted(outputs.items())}
    if request.status == "error":
        detail = "it failed when it was recorded, in a call that it may have shared, and has an answer now"
        return ReplayVerdict(verdict=Verdict.DIVERGED, layer="failure", original=original, replay=replay, detail=detail)
    differing = first_difference(request.outputs, replay["outputs"])
    if differing is None:
        named = ", ".join(replay["outputs"])
        detail = f"every output is the same to the bit: {named}"
        return ReplayVerdict(verdict=Verdict.EXACT, original=original, replay=replay, detail=detail)
    replay["first_output"] = differing
    detail = f"output {differing} differs" + ("; it ran in a call of its own" if mode == "alone" else "")
    return ReplayVerdict(verdict=Verdict.DIVERGED, layer="bits", original=original, replay=replay, detail=detail)


def first_difference(recorded: Mapping[str, str], again: Mapping[str, str]) -> str | None:
    """Name the first output that is not the same, or that only one side has; None where there is none."""
    return next((name for name in sorted({*recorded, *again}) if recorded.get(name) != again.get(name)), None)


def _outputs(ledger: Ledger, request: RecordedInference, model: OneShotPackage, mode: str) -> dict[str, Any]:
    from safetensors.numpy import load

    from runtime.engine.assembly import of_request, padded_rows, rows_of, run_again

    if request.input_ref is None or request.offset is None or request.padded is None:
        raise IncompleteRecord(f"the inputs of request {request.request_ref} were not kept", missing="inputs")
    try:
        inputs = load(ledger.read_blob(request.input_ref))
    except ClassifiedError as error:
        raise IncompleteRecord(error.message, missing="inputs", fix=error.fix) from error
    offset, padded = request.offset, request.padded
    if mode == "alone":
        contract = model.contract
        offset, padded = 0, padded_rows(contract, rows_of(contract, of_request(contract).check(inputs)))
    return run_again(model.executor, inputs, offset=offset, padded=padded, shape=request.shape)


def _failed_again(
    request: RecordedInference, error: Exception, original: Mapping[str, Any], replay: dict[str, Any]
) -> ReplayVerdict:
    from runtime.engine.errors import step_failure

    failure = step_failure(error)
    same = request.failure is not None and request.failure.get("failure_class") == failure.failure_class.value
    replay |= {"status": "error", "failure_class": failure.failure_class.value, "error_type": failure.error_type}
    return ReplayVerdict(
        verdict=Verdict.EXACT if same else Verdict.DIVERGED,
        layer=None if same else "failure",
        original=original,
        replay=replay,
        detail=f"it fails as it did: {failure.message}" if same else f"it fails now: {failure.message}",
    )


def _record(recorder: Recorder, request: str, verdict: ReplayVerdict) -> None:
    told = ("verdict", "layer", "detail", "refused_pin")
    document = verdict.to_document()
    recorder.commit(
        "replay.verdict",
        payload={name: document[name] for name in told},
        request_ref=request,
        track="B",
        result_ref=recorder.put_blob(json.dumps(document).encode()),
    )


def main() -> int:
    """Read one job from standard input, run it, report on standard output."""
    return serve(lambda line, say: run_inferences(Job.decode(line), say))


if __name__ == "__main__":
    raise SystemExit(main())
