"""What holds for every test, wherever it is started from."""

from __future__ import annotations

import os

import pytest

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # some tests import ONNX Runtime themselves


@pytest.fixture(autouse=True)
def _usual_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands print as wide as they like best: whoever starts the tests may have a narrow terminal, as workers do."""
    monkeypatch.delenv("COLUMNS", raising=False)
