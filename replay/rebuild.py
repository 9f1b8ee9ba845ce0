"""Does a preparation give the same nine stages again?  Rebuild from its record, compare stage by stage, name the first.

The rebuild runs in the nine stages' own code, into a store that is thrown away: the ledger keeps its packages and gains
one child run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from replay.environments import installed, wanted_versions
from replay.errors import PinRefused
from replay.preparation_pins import change_options, parse_choices
from replay.preparation_verdict import judge_rebuild
from replay.preparations import RecordedPreparation, RecordedStage
from replay.stage_comparison import StageComparison, compare_stage
from replay.substitutes import Substitution, Way
from replay.verdict import ReplayVerdict
from traces.failures import ClassifiedError, FailureClass

if TYPE_CHECKING:
    from manifests.preparation import PreparationManifest
    from runtime.backends.protocol import BuildOptions
    from runtime.prepare.stage import StageReport
    from traces.ledger.ledger import Ledger
    from traces.recorder import Recorder
    from traces.stages import Stage


@dataclass(frozen=True, kw_only=True)
class RebuildJob:
    """What one worker is to prepare again.

    ledger         folder of the ledger, which also takes the recording of the rebuild
    run_id         the preparation's run
    model          the only folder to look for the model in; None: every place that is known
    settings       `--set` options as written, already checked
    stop_at_first  end as soon as a stage differs
    """

    ledger: Path
    run_id: str
    model: Path | None = None
    settings: tuple[str, ...] = ()
    stop_at_first: bool = False

    def encode(self) -> str:
        """Return the job as one line of JSON."""
        document = {
            "ledger": str(self.ledger.resolve()),
            "run_id": self.run_id,
            "model": None if self.model is None else str(self.model.resolve()),
            "settings": list(self.settings),
            "stop_at_first": self.stop_at_first,
        }
        return json.dumps(document)

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read what `encode` wrote."""
        document = json.loads(text)
        return cls(
            ledger=Path(document["ledger"]),
            run_id=document["run_id"],
            model=None if document["model"] is None else Path(document["model"]),
            settings=tuple(document["settings"]),
            stop_at_first=document["stop_at_first"],
        )


@dataclass(frozen=True, kw_only=True)
class RebuildReport:
    """One line from a worker: a stage that began or was compared, or the verdict."""

    kind: Literal["begun", "stage", "verdict", "failed"]
    body: Mapping[str, Any]

    def encode(self) -> str:
        """Return the report as one line of JSON."""
        return json.dumps({"kind": self.kind, "body": dict(self.body)})

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read what `encode` wrote."""
        document = json.loads(text)
        return cls(kind=document["kind"], body=document["body"])


Say = Callable[[RebuildReport], None]


class _Enough(Exception):
    """The first difference is found and no more was asked for."""


@dataclass
class Rebuilding:
    """One rebuild while it runs: passes events on to the child run and holds each stage against the recorded one."""

    original: RecordedPreparation
    recorder: Recorder
    say: Say
    stop_at_first: bool = False
    compared: list[StageComparison] = field(default_factory=list[StageComparison])
    failed: RecordedStage | None = None
    _blobs: dict[str, bytes] = field(default_factory=dict[str, bytes])
    _emitted: str | None = None

    def commit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> None:
        """Record an event of the rebuild."""
        self.recorder.commit(event_type, payload=payload, **columns)
        if event_type == "stage.completed":
            self._emitted = str(columns["result_ref"])

    def put_blob(self, data: bytes) -> str:
        """Store evidence of the rebuild, and keep it at hand to be compared."""
        reference = self.recorder.put_blob(data)
        self._blobs[reference] = data
        return reference

    def began(self, stage: Stage) -> None:
        """Say which stage runs."""
        self.say(RebuildReport(kind="begun", body={"stage": stage.value, "name": stage.word}))

    def finished(self, report: StageReport) -> None:
        """Compare a finished stage with the recorded one."""
        data = self._blobs.get(self._emitted or "")
        rebuilt = RecordedStage(
            stage=report.stage,
            duration_us=report.duration_us,
            output_digest=report.manifest.output_digest,
            emitted=None if data is None else json.loads(data),
            record=report.record,
        )
        before = next((one for one in self.original.stages if one.stage is report.stage), None)
        self.compared.append(compare_stage(before, rebuilt))
        self.say(RebuildReport(kind="stage", body=self.compared[-1].to_document()))
        if self.stop_at_first and not self.compared[-1].same:
            raise _Enough


def rebuild(job: RebuildJob, say: Say) -> ReplayVerdict:
    """Prepare a recorded preparation again into a child run, and judge it.

    Raises IncompleteRecord where the record says too little to begin; whatever else stands in the way is the verdict.
    """
    from replay.preparations import load_preparation
    from traces.ledger.ledger import Ledger
    from traces.recorder import Recorder, random_ids

    ledger = Ledger(job.ledger)
    ledger.drain()
    original = load_preparation(ledger, job.run_id)
    with Recorder(job.ledger, run_id=f"run_{random_ids()}", component="replay") as recorder:
        verdict = _recorded(job, ledger, original, recorder, say)
    say(RebuildReport(kind="verdict", body=verdict.to_document()))
    return verdict


def _recorded(
    job: RebuildJob, ledger: Ledger, original: RecordedPreparation, recorder: Recorder, say: Say
) -> ReplayVerdict:
    """Rebuild between the child run's first and last event."""
    from runtime.probe import probe

    hardware = probe()
    started: dict[str, Any] = {
        "kind": "replay",
        "of": "preparation",
        "parent_run": original.run_id,
        "mode": "rebuild",
        "model": original.model,
        "backend": original.backend,
        "precision": original.options["precision"],
        "set": list(job.settings),
    }
    recorder.commit("run.started", payload=started, track="A", input_ref=recorder.put_blob(hardware.canonical()))
    running = Rebuilding(original, recorder, say, stop_at_first=job.stop_at_first)
    choices = parse_choices(job.settings)
    refusal: PinRefused | None = None
    prepared: PreparationManifest | None = None
    try:
        prepared = _prepare(job, ledger, running, choices)
    except _Enough:
        pass
    except PinRefused as error:
        refusal = error
    except ClassifiedError as error:
        running.failed = _failed_stage(error)
    verdict = judge_rebuild(
        original, running.compared, prepared, choices, failed=running.failed, refusal=refusal, hardware=hardware,
        child=recorder.run_id,
    )  # fmt: skip
    _record_verdict(recorder, verdict, prepared)
    return verdict


def _prepare(
    job: RebuildJob, ledger: Ledger, running: Rebuilding, choices: Sequence[Substitution]
) -> PreparationManifest:
    """Find the model by its digest and take it through the nine stages; PinRefused names what cannot be had."""
    from runtime.prepare.capture import read_options
    from runtime.prepare.pipeline import prepare
    from runtime.prepare.sources import find_source
    from runtime.prepare.store import PackageStore

    original = running.original
    folder = find_source(PackageStore(ledger.path), original.model_digest, given=job.model)
    if folder is None:
        where = f"{job.model} holds another model" if job.model else "no known folder holds the model with this digest"
        raise PinRefused(
            f"{where}: {original.model_digest}",
            pin="artifact.model_digest",
            fix="Name the folder: replay run PREPARATION --model FOLDER (or list folders in REPLAYLAB_MODELS).",
        )
    backend, options = change_options(original.backend, read_options(original.options), choices)
    _check_choices(folder, backend, options, choices)
    with tempfile.TemporaryDirectory(prefix="replaylab-rebuild-") as place:
        return prepare(
            folder,
            backend=backend,
            store=PackageStore(Path(place)),
            recorder=running,
            options=options,
            on_start=running.began,
            on_finish=running.finished,
        ).preparation


def _check_choices(folder: Path, backend: str, options: BuildOptions, choices: Sequence[Substitution]) -> None:
    """Refuse by its pin what the backend does not offer or the model cannot reach, before anything is built."""
    from replay.preparation_pins import BOUNDS
    from runtime.backends.registry import backend_named
    from runtime.prepare.capture import check_reach

    for one in choices:
        for name, version in wanted_versions(one).items() if one.way is Way.VERSION else ():
            if installed(name) != version:
                raise PinRefused(f"{version} does not run here: {name} is {installed(name)}", pin=one.pin)
        if one.pin.startswith(BOUNDS):
            try:
                check_reach(folder, {one.pin.removeprefix(BOUNDS): int(one.value)})
            except ClassifiedError as error:
                raise PinRefused(error.message, pin=one.pin, fix=error.fix) from error
    pin = choices[0].pin if choices else "compiler.backend"
    try:
        chosen: Any = backend_named(backend)
        chosen.check(options)
        chosen.check_here(options)
    except ClassifiedError as error:
        named = next((one.pin for one in choices if one.value and repr(one.value) in error.message), pin)
        raise PinRefused(error.message, pin=named, fix=error.fix) from error


def _failed_stage(error: ClassifiedError) -> RecordedStage:
    from traces.stages import Stage

    stage = Stage(error.stage) if error.stage else Stage.CAPTURE
    return RecordedStage(stage=stage, duration_us=None, output_digest=None, failure=error.to_payload())


def _record_verdict(recorder: Recorder, verdict: ReplayVerdict, prepared: PreparationManifest | None) -> None:
    document = json.dumps(verdict.to_document()).encode()
    recorder.commit(
        "replay.verdict",
        payload={
            "verdict": verdict.verdict.value,
            "layer": verdict.layer,
            "stage": verdict.stage,
            "detail": verdict.detail,
            "refused_pin": verdict.refused_pin,
        },
        track="A",
        result_ref=recorder.put_blob(document),
    )
    failed = verdict.replay.get("failure_class")
    recorder.commit(
        "run.completed",
        payload={"verdicts": {verdict.verdict.value: 1}},
        track="A",
        status="error" if failed else "ok",
        failure_class=FailureClass(failed) if failed else None,
        result_ref=None if prepared is None else recorder.put_blob(prepared.canonical()),
    )
