"""The command answers KServe v2 requests with a one-shot package, in shared calls, and records them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import replaylab
from runtime.prepare.pipeline import prepare
from runtime.prepare.store import PackageStore
from tests.runtime.one_shot_models import save_onnx_classifier
from traces.ledger.ledger import Ledger


def test_requests_are_answered_together_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = tmp_path / "ledger"
    store = PackageStore(ledger)
    store.set_alias(
        "vectors", prepare(save_onnx_classifier(tmp_path / "m.onnx"), backend="onnxruntime", store=store).digest
    )
    entry = {"name": "features", "shape": [1, 16], "datatype": "FP32", "data": [0.25] * 16}
    (tmp_path / "a.json").write_text(json.dumps({"inputs": [entry]}))
    np.savez(tmp_path / "b.npz", features=np.full((1, 16), 0.25, dtype=np.float32))
    words = ["infer", "vectors", str(tmp_path / "a.json"), str(tmp_path / "b.npz"), "--ledger", str(ledger)]
    more = ["--preferred-batch-size", "2", "--max-queue-delay-microseconds", "2000000", "--json"]
    assert replaylab.main([*words, *more]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["batch_size"] for answer in answers] == [2, 2]
    assert answers[0]["response"]["outputs"] == answers[1]["response"]["outputs"]
    assert all(a["total_us"] == sum(a[f"{p}_us"] for p in ("queue", "batch", "compute", "delivery")) for a in answers)
    found = Ledger(ledger)
    found.drain()
    kinds = [event.event_type for event in found.events() if event.event_type.startswith("oneshot.")]
    assert sorted(kinds) == ["oneshot.batch", "oneshot.request", "oneshot.request", "oneshot.started"]
    (tmp_path / "bad.json").write_text('{"inputs": 3}')
    assert replaylab.main(["infer", "vectors", str(tmp_path / "bad.json"), "--ledger", str(ledger)]) == 2
    assert "KServe v2" in capsys.readouterr().err
    (tmp_path / "wide.json").write_text(json.dumps({"inputs": [entry | {"shape": [1, 8], "data": [0.25] * 8}]}))
    assert replaylab.main(["infer", "vectors", str(tmp_path / "wide.json"), "--ledger", str(ledger)]) == 2
    assert "shape_guard" in capsys.readouterr().err
    found.drain()
    ends = [event for event in found.events(event_type="run.completed") if event.failure_class is not None]
    assert [(end.status, str(end.failure_class)) for end in ends] == [("error", "shape_guard")]
