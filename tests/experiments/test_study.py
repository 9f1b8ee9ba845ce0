"""The compiler study runs a whole cell: package, recording, replays, MLflow; a refused cell is kept too."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from experiments import study_cli


def study(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Run the command with JSON output."""
    import argparse

    parser = argparse.ArgumentParser()
    study_cli.add_arguments(parser)
    common = ["compilers", "--ledger", str(folder / "ledger"), "--store", f"sqlite:///{folder / 'mlflow.db'}", "--json"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's and the exporters' own deprecations
        code = study_cli.run(parser.parse_args([*common, *words]))
    said = capsys.readouterr().out
    return code, json.loads(said)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from runtime.models.random_checkpoint import random_checkpoint

    return random_checkpoint(tmp_path_factory.mktemp("study") / "model", seed=1, vocab_size=768, num_layers=1)


def test_one_cell_runs_and_one_refuses_and_both_are_tracked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--model",
        str(model),
        "--backends",
        "eager",
        "--batch-sizes",
        "2",
        "--requests",
        "4",
        "--replays",
        "1",
    ]
    code, found = study(tmp_path, capsys, *words, "--precisions", "float32,float8")
    assert code == 0
    ran, refused = found["cells"]
    assert ran["metrics"]["replay_faithful_exact_rate"] == 1.0
    assert ran["metrics"]["ttft_ms_p50"] > 0
    assert set(ran["tags"]) >= {"replaylab.run", "replaylab.package", "pins.compiler", "pins.hardware"}
    assert refused["refused"]["failure_class"] == "artifact_compatibility"

    from experiments.tracking import open_client

    client = open_client(found["store"])
    experiment = client.get_experiment_by_name(found["experiment"])
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    child = runs["eager-float32-2"]
    assert child.data.tags["mlflow.parentRunId"] == found["parent_run"]
    assert child.data.tags["pins.compiler"].startswith("sha256:")
    assert child.data.metrics["replay_faithful_exact_rate"] == 1.0
    assert runs["eager-float8-2"].info.status == "FAILED"
    assert runs["eager-float8-2"].data.tags["failure_class"] == "artifact_compatibility"


def test_bad_input_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = study(tmp_path, capsys, "--model", str(tmp_path))
    assert code == 2
    assert "holds no checkpoint" in found["error"]["message"]
    code, found = study(tmp_path, capsys, "--requests", "1")
    assert code == 2
    assert "at least 4 requests" in found["error"]["message"]
