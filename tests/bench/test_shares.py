"""Which share of a step is arithmetic, and which is planning, evidence and recording?  Figures are printed only."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.engine import stepping
from runtime.engine.loop import Engine
from tests.bench.comparison import quiet_checkpoint
from tests.bench.test_engine import ROWS, SCHEDULING, TOKENS, WatchedRecorder, spend


@pytest.mark.slow
def test_shares_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """CPU of 32 rows of the comparison checkpoint on ONNX Runtime: the model, the scheduler, recording, the rest."""
    from runtime.prepare.load import load_package
    from runtime.prepare.pipeline import prepare
    from runtime.prepare.store import PackageStore
    from traces.recorder import Recorder

    spent: Counter[str] = Counter()

    def watch(holder: Any, name: str, account: str) -> None:
        call: Callable[..., Any] = getattr(holder, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                spent[account] += time.thread_time() - began

        monkeypatch.setattr(holder, name, timed)

    store = PackageStore(tmp_path / "ledger")
    folder = quiet_checkpoint(tmp_path / "model")
    model = load_package(store, prepare(folder, backend="onnxruntime", store=store).digest)
    watch(stepping, "plan_step", "scheduler")
    watch(stepping, "complete_step", "scheduler")
    watch(model.executor, "step", "model")
    rounds: list[dict[str, float]] = []
    with Recorder(tmp_path / "ledger", run_id="run_bench", component="engine") as recorder:
        watched = WatchedRecorder(recorder)
        with Engine(model, SCHEDULING, watched) as engine:
            for number in range(6):
                spent.clear()
                before = watched.total()
                whole = spend(engine, seed=number)[0]
                parts = {**spent, "recording": watched.total() - before}
                if number:  # the first round warms up
                    rounds.append({name: seconds / whole for name, seconds in parts.items()} | {"whole": whole})
    share = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    both = statistics.median(one["scheduler"] + one["recording"] for one in rounds)
    with capsys.disabled():
        print(
            f"\na step of {ROWS} rows takes {share['whole'] / TOKENS * 1e6:.0f} us of CPU: model {share['model']:.1%}, "
            f"scheduler {share['scheduler']:.1%}, recording {share['recording']:.1%} (both {both:.1%}), the rest is "
            "inputs, the cache, choice with evidence, hand-out"
        )
