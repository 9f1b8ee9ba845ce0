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


def _refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert replaylab.main(words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_rebuild_like_a_package_refuses_options_that_it_would_ignore(
    model_folder: Path, copied_store: PackageStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = copied_store.digests()[0]
    words = ["prepare", str(model_folder), "--like", first, "--ledger", str(tmp_path)]
    said = _refused([*words, "--precision", "int8", "--flag", "a=b", "--max-batch", "8"], capsys)
    assert "--precision, --flag, --max-batch" in said
    assert "--batch-invariant" in _refused([*words, "--batch-invariant"], capsys)
    assert "--like" in _refused([*words, "--threads", "1"], capsys)


@pytest.mark.parametrize("option", ["--deadline", "--max-spread", "--max-step"])
@pytest.mark.parametrize("value", ["-5", "0", "soon"])
def test_a_limit_that_is_no_limit_is_refused_with_its_range(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        replaylab.main(["prepare", "model", option, value])
    assert caught.value.code == 2
    assert f"{option}: {value!r} is not a whole number from 1" in capsys.readouterr().err


def test_a_provider_that_is_not_there_is_refused_before_anything_is_recorded(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", str(model_folder), "--ledger", str(tmp_path), "--provider"]
    said = _refused([*words, "Nope"], capsys)
    assert "no Nope" in said and "CPUExecutionProvider" in said
    assert "at stage" not in said
    assert not (tmp_path / "outbox").exists()
    said = _refused([*words, "Nope", "--backend", "inductor"], capsys)
    assert "none" not in said and "leave it out" in said


def test_bounds_say_why_they_are_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", str(model_folder), "--backend", "eager", "--ledger", str(tmp_path)]
    for few in ("1", "3"):
        said = _refused([*words, "--max-batch", few], capsys)
        assert "traced with 3" in said and "at least 4" in said
    said = _refused([*words, "--max-context", "12"], capsys)
    assert "fixture" in said and "at least 20" in said
    for option in ("--max-context", "--max-tokens"):
        said = _refused([*words, option, "100000000"], capsys)
        assert f"{option[2:].replace('-', '_')} 100000000" in said and "512 positions" in said
    assert replaylab.main([*words, "--max-context", "512", "--max-batch", "4"]) == 0


def test_packages_are_shown_in_words(
    copied_store: PackageStore,
    prepared: Callable[..., PreparedPackage],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package, place = prepared("onnxruntime", "float32").digest, ["--ledger", str(tmp_path)]
    assert replaylab.main(["packages", "show", package, *place]) == 0
    shown = capsys.readouterr().out
    assert not set("{}'") & set(shown)
    assert "None" not in shown and "False" not in shown
    for said in ("batch invariant", "execution providers", "CPUExecutionProvider", "B 1..16", "ready"):
        assert said in shown
    (copied_store.path(package) / "tokenizer.json").write_text("{}")
    assert replaylab.main(["packages", "verify", *place]) == 1
    verified = capsys.readouterr().out
    assert "True" not in verified and "False" not in verified
    assert " yes " in verified and " no " in verified


@pytest.mark.parametrize("columns", [70, 180])
def test_a_table_that_is_piped_is_as_wide_as_columns_says(
    copied_store: PackageStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in (["packages", "show", copied_store.digests()[0], "--ledger", str(tmp_path)], ["prepare", "--choices"]):
        assert replaylab.main(words) == 0
        widths = [len(line) for line in capsys.readouterr().out.splitlines() if line[:1] in "┏┃│└"]
        assert max(widths) <= columns
        assert max(widths) > 70 or columns == 70
