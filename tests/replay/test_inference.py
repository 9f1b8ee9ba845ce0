"""A one-shot request replays to the bit from its place in its call; what differs or stands in the way is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save

import replaylab
from replay.catalog import list_requests, list_runs
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


def _again(recorded: tuple[Path, str, str], *changed: int) -> str:
    """Answer the six requests again, some with other inputs; returns the run."""
    ledger, _, package = recorded
    files = [str(ledger.parent / f"{index}.npz") for index in range(6)]
    for index in changed:
        features = np.load(files[index])["features"] + np.float32(1)
        files[index] = str(ledger.parent / f"changed-{index}.npz")
        np.savez(files[index], features=features)
    assert replaylab.main(["infer", package, *files, "--ledger", str(ledger)]) == 0
    opened = Ledger(ledger)
    opened.drain()
    return list_runs(opened)[0].run_id


def _altered(recorded: tuple[Path, str, str], **columns: Any) -> str:
    """Write a run whose one request is a recorded one, altered; returns the run."""
    ledger, run_id, _ = recorded
    opened = Ledger(ledger)
    events = opened.events(run_id=run_id)
    begun = next(event for event in events if event.event_type == "run.started")
    answered = next(event for event in events if event.event_type == "oneshot.request")
    other = f"run_{random_ids()}"
    with Recorder(ledger, run_id=other, component="test") as recorder:
        recorder.commit("run.started", payload=begun.payload, track="B", input_ref=begun.input_ref)
        columns = {"status": "ok", "payload": answered.payload, "result_ref": answered.result_ref} | columns
        recorder.commit(
            "oneshot.request", request_ref=f"req_{random_ids()}", track="B", input_ref=answered.input_ref, **columns
        )
    opened.drain()
    return other


def test_two_runs_are_compared_where_they_had_the_same_inputs(
    recorded: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, run_id, _ = recorded
    code, found = asked(capsys, ledger, "diff", run_id, _again(recorded, 2))
    assert (code, len(found["requests"]), found["right"]["requests"]) == (0, 5, 6)
    assert {one["verdict"] for one in found["requests"]} == {"exact"}
    other = _again(recorded, *range(6))
    assert main(["diff", run_id, other, "--ledger", str(ledger)]) == 2
    assert "had the same inputs" in capsys.readouterr().err
    one, two = (list_requests(Ledger(ledger), run)[0].request_ref for run in (run_id, other))
    code, found = asked(capsys, ledger, "diff", one, two)
    assert (code, found["requests"][0]["layer"]) == (1, "input")


def test_a_difference_of_two_one_shot_runs_is_named_by_its_layer_and_output(
    recorded: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, run_id, _ = recorded
    opened = Ledger(ledger)
    answered = next(event for event in opened.events(run_id=run_id) if event.event_type == "oneshot.request")
    arrays = load_arrays(opened.read_blob(str(answered.result_ref)))
    arrays["probabilities"] = arrays["probabilities"] + np.float32(0.25)
    with Recorder(ledger, run_id=f"run_{random_ids()}", component="test") as recorder:
        recorder.commit("run.started", payload={"kind": "live"})
        result = recorder.put_blob(save(arrays))
    outputs = answered.payload["outputs"] | {"probabilities": "sha256:" + "0" * 64}
    bits = _altered(recorded, payload=answered.payload | {"outputs": outputs}, result_ref=result)
    code, found = asked(capsys, ledger, "diff", run_id, bits)
    (pair,) = found["requests"]
    assert (code, pair["layer"], pair["first_output"]) == (1, "bits", "probabilities")
    assert "by 0.25 at most" in pair["detail"]
    assert main(["diff", run_id, bits, "--ledger", str(ledger)]) == 1
    said = capsys.readouterr().out
    assert "1 of 6 compared" in said and "no pin differs" in said and "row 0 of" in said


def test_the_newest_one_shot_failure_is_the_incident(
    recorded: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, run_id, _ = recorded
    assert main(["last", "--ledger", str(ledger)]) == 0
    answered = next(event for event in Ledger(ledger).events(run_id=run_id) if event.event_type == "oneshot.request")
    error = {"failure_class": "model_provider", "message": "the call broke"}
    payload = answered.payload | {"outputs": {}, "error": error}
    failed = _altered(recorded, payload=payload, status="error", failure_class="model_provider", result_ref=None)
    capsys.readouterr()
    assert main(["last", "--ledger", str(ledger)]) == 0
    said = capsys.readouterr()
    assert failed in said.out and "the call broke" in said.out
    assert "No incident" not in said.err
    code, found = asked(capsys, ledger, "diff", run_id, failed)
    assert (code, found["requests"][0]["layer"]) == (1, "failure")
    assert found["requests"][0]["detail"] == "ok (no failure) against error (model_provider)"


def test_a_one_shot_run_is_compared_with_nothing_of_another_kind_and_a_diverged_replay_can_be_shown(
    recorded: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, run_id, _ = recorded
    first = list_requests(Ledger(ledger), run_id)[0].request_ref
    _, found = asked(capsys, ledger, "run", first)
    child = found["replay"]["run"]
    assert main(["diff", run_id, child, "--ledger", str(ledger)]) == 2
    said = capsys.readouterr().err
    assert "is a replay of one-shot requests" in said and "fix:" in said
    answered = next(event for event in Ledger(ledger).events(run_id=run_id) if event.event_type == "oneshot.request")
    outputs = answered.payload["outputs"] | {"probabilities": "sha256:" + "0" * 64}
    other = _altered(recorded, payload=answered.payload | {"outputs": outputs})
    assert main(["run", other, "--ledger", str(ledger)]) == 1
    capsys.readouterr()
    assert main(["last", "--ledger", str(ledger)]) == 0
    assert other in capsys.readouterr().out
    assert main(["show", f"{child}/{first}", "--ledger", str(ledger)]) == 2
