"""`replaylab serve` says what is wrong in words, with its exit code, and never with a traceback."""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path

import pytest

from runtime.gateway import cli


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(words)


def test_a_missing_deployment_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(arguments("--ledger", str(tmp_path), "--deployment", str(tmp_path / "none")))
    assert code == 2
    said = capsys.readouterr().err
    assert "no readable deployment" in said and "Fix:" in said and "Traceback" not in said


def test_an_unknown_package_is_refused_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(arguments("--ledger", str(tmp_path), "--create", "nothing", "--json"))
    assert code == 2
    assert json.loads(capsys.readouterr().out)["failure_class"] == "artifact_compatibility"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scheduling", "policy=fair"], "a deployment has its own settings"),
        (["--create", "nothing", "--scheduling", "policy=best"], "one of fcfs, priority, deadline, fair"),
        (["--create", "nothing", "--scheduling", "polcy=fair"], "Did you mean policy"),
    ],
)
def test_a_wrong_scheduling_setting_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments("--ledger", str(tmp_path), *words)) == 2
    assert said in capsys.readouterr().err


def test_a_taken_port_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from runtime.serve.deployment import create_support_desk

    create_support_desk(tmp_path / "desk", seed=1, packages={"primary": "sha256:" + "0" * 64})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code = cli.run(arguments("--ledger", str(tmp_path), "--deployment", str(tmp_path / "desk"), "--port", port))
    assert code == 3
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


def test_a_deployment_whose_package_is_gone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from runtime.serve.deployment import create_support_desk

    create_support_desk(tmp_path / "desk", seed=1, packages={"primary": "sha256:" + "0" * 64})
    code = cli.run(
        arguments("--ledger", str(tmp_path / "ledger"), "--deployment", str(tmp_path / "desk"), "--port", "0")
    )
    assert code == 2
    assert "Traceback" not in capsys.readouterr().err
