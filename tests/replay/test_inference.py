"""A one-shot request replays to the bit from its place in its call; what differs or stands in the way is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import replaylab
from replay.catalog import list_runs
from replay.cli import main
from replay.inference_worker import first_difference
from runtime.prepare.pipeline import prepare
from runtime.prepare.store import PackageStore
from tests.runtime.one_shot_models import save_onnx_classifier, save_perceptron
from traces.ledger.ledger import Ledger
from traces.recorder import Recorder, random_ids

MODELS = {"eager": save_perceptron, "onnxruntime": save_onnx_classifier}


@pytest.fixture(scope="module", params=sorted(MODELS))
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Record six requests at once; returns the ledger, the run and the package."""
    folder = tmp_path_factory.mktemp(request.param)
    suffix = "onnx" if request.param == "onnxruntime" else "pt2"
    model = MODELS[request.param](folder / f"model.{suffix}")
    ledger = folder / "ledger"
    package = prepare(model, backend=request.param, store=PackageStore(ledger)).digest
    values = np.random.default_rng(5)
    files: list[str] = []
    for index in range(6):
        files.append(str(folder / f"{index}.npz"))
        np.savez(files[-1], features=values.standard_normal((1 + index % 2, 16)).astype(np.float32))
    assert replaylab.main(["infer", package, *files, "--ledger", str(ledger)]) == 0
    opened = Ledger(ledger)
    opened.drain()
    return ledger, list_runs(opened)[0].run_id, package


def asked(capsys: pytest.CaptureFixture[str], ledger: Path, *words: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = main([*words, "--ledger", str(ledger), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_every_request_of_a_run_replays_exactly(
    recorded: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, run_id, _ = recorded
    _, runs = asked(capsys, ledger, "list")
    listed = next(one for one in runs if one["run"] == run_id)
    assert (listed["kind"], listed["requests"], listed["outcomes"]) == ("inference", 6, {"ok": 6})
    code, found = asked(capsys, ledger, "run", run_id)
    assert (code, found["summary"]) == (0, {"exact": 6}), found
    assert any(one["original"]["batch_size"] > 1 for one in found["replays"]), "requests shared calls"
    request = found["replays"][-1]["original"]["request"]
    code, alone = asked(capsys, ledger, "run", request, "--mode", "alone")
    assert code == (0 if alone["verdict"] == "exact" else 1)
    assert alone["replay"]["mode"] == "alone"
    code, shown = asked(capsys, ledger, "show", request)
    assert code == 0
    assert sum(shown["times_us"].values()) == shown["duration_us"]
    assert main(["show", request, "--ledger", str(ledger)]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("queue", "batch", "compute", "delivery", "instance 0")), said


def test_what_cannot_be_replayed_is_refused_in_one_line(
    recorded: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, run_id, _ = recorded
    code, refused = asked(capsys, ledger, "run", run_id, "--set", "compiler.precision=bfloat16")
    assert (code, refused["replays"][0]["refused_pin"]) == (2, "compiler.precision")
    capsys.readouterr()
    for words in (["run", "req_unknown"], ["run", run_id, "--mode", "forced"], ["check", run_id]):
        assert main([*words, "--ledger", str(ledger)]) == 2
        said = capsys.readouterr().err
        assert said
        assert "Traceback" not in said


def test_a_damaged_package_is_refused_by_its_digest_and_names_the_file(
    recorded: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, run_id, package = recorded
    store = PackageStore(ledger)
    largest = max(store.path(package).iterdir(), key=lambda path: path.stat().st_size)
    kept = largest.read_bytes()
    largest.chmod(0o600)
    try:
        largest.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        code, found = asked(capsys, ledger, "run", run_id)
    finally:
        largest.write_bytes(kept)
    assert (code, found["summary"]) == (2, {"refused": 6})
    assert {one["refused_pin"] for one in found["replays"]} == {"artifact.package_digest"}
    assert largest.name in found["replays"][0]["detail"]


def test_a_request_whose_recorded_bits_were_others_diverges_in_that_output(
    recorded: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, run_id, _ = recorded
    events = list(Ledger(ledger).events(run_id=run_id))
    begun = next(event for event in events if event.event_type == "run.started")
    answered = next(event for event in events if event.event_type == "oneshot.request")
    other = f"run_{random_ids()}"
    with Recorder(ledger, run_id=other, component="test") as recorder:
        recorder.commit("run.started", payload=begun.payload, track="B", input_ref=begun.input_ref)
        outputs = answered.payload["outputs"] | {"probabilities": "sha256:" + "0" * 64}
        recorder.commit(
            "oneshot.request",
            payload=answered.payload | {"outputs": outputs},
            request_ref=f"req_{random_ids()}",
            track="B",
            status="ok",
            batch_size=answered.batch_size,
            input_ref=answered.input_ref,
        )
    code, found = asked(capsys, ledger, "run", other)
    assert (code, found["summary"]) == (1, {"diverged": 1})
    assert (found["replays"][0]["layer"], found["replays"][0]["replay"]["first_output"]) == ("bits", "probabilities")


def test_the_first_output_that_differs_is_named() -> None:
    assert first_difference({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) is None
    assert first_difference({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "c": "y"}) == "b"
    assert first_difference({"b": "2"}, {"a": "1", "b": "2"}) == "a"
