"""The command refuses what cannot work, and the pages load nothing heavy."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dashboards import cli


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(words)


def test_a_taken_port_is_refused_in_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((cli.ADDRESS, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.run(arguments("--ledger", str(tmp_path), "--port", str(port))) == 2
    assert f"port {port} on 127.0.0.1 is in use" in capsys.readouterr().err


def test_a_file_is_no_ledger(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("")
    assert cli.run(arguments("--ledger", str(tmp_path / "notes"))) == 2
    assert "not a ledger" in capsys.readouterr().err


def test_pages_are_served_on_this_machine_only_and_send_nothing() -> None:
    words = " ".join(cli.command(8501))
    assert "--server.address 127.0.0.1" in words
    assert "--browser.gatherUsageStats false" in words


def test_pages_load_no_model_runtime_and_no_tracking() -> None:
    code = (
        "import sys, dashboards.app;"
        "heavy = {'torch', 'onnxruntime', 'runtime', 'replay', 'mlflow', 'experiments'};"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stderr
