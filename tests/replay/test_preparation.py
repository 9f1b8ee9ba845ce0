"""A preparation rebuilds exactly; whatever is changed in one stage is named as the first that differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from replay.cli import main
from replay.preparation_check import assess_preparation
from replay.preparations import load_preparation
from replay.rebuild import RebuildJob, rebuild
from replay.verdict import ReplayVerdict, Verdict
from runtime.backends.contract import Bounds
from runtime.backends.protocol import BuildOptions
from runtime.backends.registry import BACKENDS
from runtime.models.random_checkpoint import random_checkpoint
from runtime.prepare.recorded import prepare_recorded
from tests.replay.plants import OWN, STAGES, plant_for
from traces.failures import ClassifiedError
from traces.ledger.ledger import Ledger

OPTIONS = BuildOptions(bounds=Bounds(max_batch=8, max_tokens=16, max_context=32))
SLOW = pytest.mark.slow
TRIED = tuple(backend.name for backend in BACKENDS if backend.name in ("eager", *OWN))
NAMES = [pytest.param(name, marks=() if name == "eager" else SLOW) for name in TRIED]
CELLS = [
    pytest.param(name, stage, marks=() if name == "eager" or (name == "onnxruntime" and stage in OWN[name]) else SLOW)
    for name in TRIED
    for stage in STAGES
]
"""Backend and stage; what all backends share is planted on eager by default, on every backend among the slow ones."""


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preparations") / "ledger"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return random_checkpoint(folder, seed=3, num_layers=1, hidden_size=32, intermediate_size=32, num_heads=2)


def newest(ledger: Path) -> str:
    opened = Ledger(ledger)
    opened.drain()
    started = opened.events(event_type="run.started")
    return max((event for event in started if event.payload["kind"] == "preparation"), key=lambda e: e.ts_us).run_id


@pytest.fixture(scope="module")
def recorded(ledger: Path, model: Path) -> Callable[[str], str]:
    """Prepare once for each backend; returns the run."""
    runs: dict[str, str] = {}

    def get(backend: str) -> str:
        if backend not in runs:
            prepare_recorded(model, backend=backend, options=OPTIONS, ledger=ledger)
            runs[backend] = newest(ledger)
        return runs[backend]

    return get


@pytest.fixture
def again(ledger: Path) -> Callable[..., ReplayVerdict]:
    def run(run_id: str, *settings: str, **job: object) -> ReplayVerdict:
        try:
            return rebuild(RebuildJob(ledger=ledger, run_id=run_id, settings=settings, **job), lambda report: None)  # type: ignore[arg-type]
        finally:
            torch.set_num_threads(1)

    return run


@pytest.mark.parametrize("backend", NAMES)
def test_a_rebuild_under_its_own_pins_is_exact_in_nine_stages(
    recorded: Callable[[str], str], again: Callable[..., ReplayVerdict], backend: str
) -> None:
    verdict = again(recorded(backend))
    assert (verdict.verdict, verdict.stage) == (Verdict.EXACT, None), verdict.detail
    assert [stage["same"] for stage in verdict.replay["stages"]] == [True] * 9
    assert verdict.pins_changed == ()


@pytest.mark.parametrize(("backend", "stage"), CELLS)
def test_a_change_in_one_stage_is_named_as_the_first_that_differs(
    recorded: Callable[[str], str],
    again: Callable[..., ReplayVerdict],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    backend: str,
    stage: str,
) -> None:
    plant = plant_for(backend, stage)
    if plant is None:
        return  # the stage has nothing to decide on this backend, so nothing can be planted
    run = recorded(backend)
    if plant.patch is not None:
        plant.patch(monkeypatch, backend, tmp_path)
    verdict = again(run, *plant.settings, stop_at_first=True)
    assert (verdict.verdict, verdict.stage) == (Verdict.DIVERGED, stage), verdict.detail
    assert verdict.replay["stages"][-1]["fields"], "the fields say in what it differs"
    assert [pin["pin"] for pin in verdict.pins_changed if pin["set"]] == [
        setting.partition("=")[0] for setting in plant.settings
    ]


def test_the_command_rebuilds_in_a_worker_and_shows_lists_and_compares(
    recorded: Callable[[str], str], ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded("eager")
    place = ["--ledger", str(ledger)]
    assert main(["run", run, *place, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == "exact"
    child = printed["replay"]["run"]
    assert main(["show", run, *place]) == 0
    shown = capsys.readouterr().out
    assert all(f"a0{number}" in shown for number in range(1, 10))
    assert main(["show", child, *place, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["parent"], document["verdict"]["verdict"], len(document["stages"])) == (run, "exact", 9)
    assert main(["list", "--limit", "0", *place, "--json"]) == 0
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[run]["subject"] == "tiny eager float32"
    assert rows[child]["verdicts"] == {"exact": 1}
    assert main(["check", run, *place]) == 0
    assert "bitwise" in capsys.readouterr().out
    assert main(["diff", run, child, *place]) == 0
    capsys.readouterr()
    assert main(["diff", run, recorded("onnxruntime"), *place, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["first_stage"] == "a01 capture"
    assert "compiler.backend" in {pin["pin"] for pin in found["pins"]}


def test_the_model_is_found_by_its_digest_or_refused_by_its_pin(
    recorded: Callable[[str], str], again: Callable[..., ReplayVerdict], ledger: Path, model: Path, tmp_path: Path
) -> None:
    run = recorded("eager")
    other = random_checkpoint(tmp_path / "other", seed=4)
    verdict = again(run, model=other)
    assert (verdict.verdict, verdict.refused_pin) == (Verdict.REFUSED, "artifact.model_digest")
    moved = tmp_path / "moved"
    model.rename(moved)
    try:
        verdict = again(run)
        assert (verdict.verdict, verdict.refused_pin) == (Verdict.REFUSED, "artifact.model_digest")
        (missing,) = assess_preparation(Ledger(ledger), load_preparation(Ledger(ledger), run)).missing
        assert missing.pin == "artifact.model_digest"
        verdict = again(run, "compiler.flags.norm=unfused", model=moved, stop_at_first=True)
        assert verdict.stage == "a01", "a folder that is named is looked into"
    finally:
        moved.rename(model)


@pytest.mark.parametrize(
    ("setting", "pin"),
    [
        ("compiler.optimization_level=o9", "compiler.optimization_level"),
        ("compiler.backend=abacus", "compiler.backend"),
        ("compiler.precision=float8", "compiler.precision"),
        ("compiler.flags.speed=high", "compiler.flags.speed"),
        ("compiler.bounds.max_context=100000000", "compiler.bounds.max_context"),
    ],
)
def test_a_choice_that_the_backend_does_not_offer_is_refused_by_its_pin(
    recorded: Callable[[str], str], again: Callable[..., ReplayVerdict], setting: str, pin: str
) -> None:
    verdict = again(recorded("eager"), setting)
    assert (verdict.verdict, verdict.refused_pin) == (Verdict.REFUSED, pin)
    assert verdict.replay["fix"]


@pytest.mark.parametrize("setting", ["compiler.speed=9", "generation.seed=1", "artifact.package_digest=x", "nonsense"])
def test_what_is_no_choice_of_a_preparation_is_refused_before_anything_runs(
    recorded: Callable[[str], str], ledger: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    assert main(["run", recorded("eager"), "--set", setting, "--ledger", str(ledger), "--json"]) == 2
    printed = json.loads(capsys.readouterr().out)
    assert (printed["verdict"], printed["refused_pin"]) == ("refused", setting.partition("=")[0])


def test_an_option_of_requests_is_refused_for_a_preparation(
    recorded: Callable[[str], str], ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", recorded("eager"), "--repeat", "3", "--ledger", str(ledger)]) == 2
    assert "--repeat does not apply to a preparation" in capsys.readouterr().err


def test_a_failed_preparation_fails_alike_when_it_is_run_again(
    ledger: Path, model: Path, again: Callable[..., ReplayVerdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = BuildOptions(bounds=Bounds(max_batch=2))
    with pytest.raises(ClassifiedError):
        prepare_recorded(model, backend="eager", options=small, ledger=ledger)
    run = newest(ledger)
    failed = load_preparation(Ledger(ledger), run).failed
    assert failed is not None
    assert failed.stage.value == "a01"
    verdict = again(run)
    assert verdict.verdict is Verdict.EXACT
    assert "fails alike" in verdict.detail
    mended = again(run, "compiler.bounds.max_batch=8", stop_at_first=True)
    assert (mended.verdict, mended.stage) == (Verdict.DIVERGED, "a01")


def test_what_is_declared_not_to_repeat_is_told_as_declared(
    recorded: Callable[[str], str], ledger: Path, again: Callable[..., ReplayVerdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.prepare import package

    declared = {"reproducible": False, "from_stage": "a06", "reason": "made up for this test"}
    plant = plant_for("eager", "a06")
    early = plant_for("eager", "a02")
    assert plant is not None
    assert plant.patch is not None
    assert early is not None
    assert early.patch is not None
    model = Path(json.loads((ledger / "packages" / "sources.json").read_bytes()).popitem()[1][0])
    with monkeypatch.context() as patched:
        patched.setattr(package, "reproducible_build", lambda backend, options: declared)
        prepare_recorded(model, backend="eager", options=OPTIONS, ledger=ledger)
    run = newest(ledger)
    plant.patch(monkeypatch, "eager", ledger)
    verdict = again(run)
    assert (verdict.verdict, verdict.stage) == (Verdict.UNVERIFIED, "a06")
    assert verdict.detail.startswith("declared not reproducible from a06 on: made up")
    early.patch(monkeypatch, "eager", ledger)
    assert again(run, stop_at_first=True).verdict is Verdict.DIVERGED, "an earlier stage must repeat all the same"
