"""The commands answer in words and in JSON, with the documented exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import replaylab
from runtime.backends.registry import BACKENDS
from runtime.models.random_checkpoint import random_checkpoint
from runtime.prepare.pipeline import PreparedPackage
from runtime.prepare.store import PackageStore
from traces.ledger.ledger import Ledger


def test_prepare_records_into_the_ledger_and_names_the_package(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", str(model_folder), "--backend", "eager", "--name", "desk", "--ledger", str(tmp_path)]
    assert replaylab.main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in document["stages"]] == [f"a0{number}" for number in range(1, 10)]
    assert PackageStore(tmp_path).resolve("desk") == document["package"]
    ledger = Ledger(tmp_path)
    ledger.drain()
    events = ledger.events()
    kinds = [event.event_type for event in events if event.event_type.startswith("run.")]
    assert kinds == ["run.started", "run.completed"]
    assert sum(event.event_type == "stage.completed" for event in events) == 9
    assert {event.track for event in events if event.stage} == {"A"}
    assert replaylab.main(["packages", "show", "desk", "--ledger", str(tmp_path)]) == 0
    assert "a09 warm" in capsys.readouterr().out


def test_a_rebuild_like_a_package_says_whether_all_nine_stages_agree(
    model_folder: Path, copied_store: PackageStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = next(d for d in copied_store.digests() if copied_store.read_manifest(d).compiler.backend == "eager")
    words = ["prepare", str(model_folder), "--like", first, "--ledger", str(tmp_path), "--json"]
    assert replaylab.main(words) == 0
    rebuild = json.loads(capsys.readouterr().out)["rebuild"]
    assert rebuild == {"package": first, "equal": True, "first_stage": None, "stages_compared": 9}
    other = random_checkpoint(tmp_path / "other", seed=4)
    assert replaylab.main(["prepare", str(other), *words[2:]]) == 1
    assert json.loads(capsys.readouterr().out)["rebuild"]["first_stage"] == "a01 capture"


def test_a_refusal_is_one_error_with_class_and_fix(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", str(model_folder), "--backend", "onnxruntime", "--precision", "bfloat16"]
    assert replaylab.main([*words, "--ledger", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "artifact_compatibility" in error
    assert "fix:" in error
    assert "Traceback" not in error
    assert replaylab.main([*words, "--ledger", str(tmp_path), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["failure_class"] == "artifact_compatibility"


@pytest.mark.parametrize("words", [["prepare", "nowhere"], ["prepare", ".", "--flag", "freezing"]])
def test_bad_input_is_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replaylab.main([*words, "--ledger", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_packages_lists_verifies_and_compares(
    copied_store: PackageStore,
    prepared: Callable[..., PreparedPackage],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    eager, onnx = prepared("eager", "float32").digest, prepared("onnxruntime", "float32").digest
    place = ["--ledger", str(tmp_path), "--json"]
    assert replaylab.main(["packages", "list", *place]) == 0
    listed = json.loads(capsys.readouterr().out)["packages"]
    assert {row["package"] for row in listed} >= {eager, onnx}
    assert replaylab.main(["packages", "verify", *place]) == 0
    capsys.readouterr()
    assert replaylab.main(["packages", "compare", eager, eager, *place]) == 0
    capsys.readouterr()
    assert replaylab.main(["packages", "compare", eager, onnx, *place]) == 1
    compared = json.loads(capsys.readouterr().out)
    assert compared["first_stage"] == "a01 capture"
    assert "compiler.backend" in {entry["field"] for entry in compared["differences"]}
    (copied_store.path(eager) / "tokenizer.json").write_text("{}")
    assert replaylab.main(["packages", "verify", *place]) == 1
    capsys.readouterr()
    assert replaylab.main(["packages", "show", "nothing-here", *place]) == 2
    with pytest.raises(SystemExit) as refused:  # argparse says what is missing
        replaylab.main(["packages", "compare", eager, *place])
    assert refused.value.code == 2


def test_choices_lists_every_backend_with_each_flag_and_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert replaylab.main(["prepare", "--choices", "--json"]) == 0
    listed = {one["backend"]: one for one in json.loads(capsys.readouterr().out)["backends"]}
    assert set(listed) == {backend.name for backend in BACKENDS}
    for backend in BACKENDS:
        assert listed[backend.name]["flags"] == {name: list(values) for name, values in backend.flags.items()}
    assert replaylab.main(["prepare", "--choices"]) == 0
    assert "compiler.flags.freezing" in capsys.readouterr().out
    assert replaylab.main(["prepare"]) == 2


def test_a_pass_that_no_level_runs_is_refused_with_those_that_run(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", str(model_folder), "--backend", "onnxruntime", "--ledger", str(tmp_path), "--json"]
    assert replaylab.main([*words, "--flag", "disable_optimizers=Wonder"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "Wonder" in error["message"]
    assert "MatMulAddFusion" in error["fix"]
    fused = ["--flag", "disable_optimizers=QuickGeluFusion;MatMulScaleFusion", "--flag", "memory_pattern=1"]
    assert replaylab.main([*words, *fused]) == 0
    made = json.loads(capsys.readouterr().out)
    ran = {entry["name"] for entry in made["stages"][3]["record"]["pass_list"]}
    assert not {"QuickGeluFusion", "MatMulScaleFusion"} & ran
    assert made["compiler"]["flags"]["session.memory_pattern"] == "1"


@pytest.mark.parametrize("threads", ["0", "4000"])
def test_a_number_of_threads_that_no_machine_has_is_refused(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        replaylab.main(["prepare", "model", "--threads", threads])
    assert caught.value.code == 2
    assert "--threads" in capsys.readouterr().err
