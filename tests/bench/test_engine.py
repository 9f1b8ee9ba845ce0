"""What does the engine cost beside the model, and what does recording cost the engine?  Figures are printed only.

Recording is measured in pairs: the same requests through a recorded and an unrecorded engine on one executor, order
swapped each round, so that a busy machine weighs on both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifests.scheduling import SchedulingManifest
from runtime.backends.contract import Bounds, InputContract
from runtime.backends.protocol import StepOutput
from runtime.engine.generation import GenerationRequest, Sampling
from runtime.engine.loop import Engine
from tests.runtime.engine.toy import WIDTH, ListRecorder, ToyExecutor, ToyModel

ROWS = 32
SCHEDULING = SchedulingManifest(max_num_seqs=ROWS, max_num_batched_tokens=1024, num_blocks=1024, batch_sizes=(1, 8, 32))


class FreeExecutor(ToyExecutor):
    """Answers fixed logits at once: what remains of a step is the engine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.contract = InputContract.of(self.config, Bounds(max_batch=64, max_tokens=128, max_context=2048))
        self._row = np.random.default_rng(0).standard_normal((1, 1, self.vocab_size)).astype(np.float32)
        self._answers = {size: np.repeat(self._row, size, axis=0) for size in SCHEDULING.batch_sizes}

    def step(self, tokens: Any, positions: Any, slots: Any, context_lengths: Any, pool: Any) -> StepOutput:
        """The same logits for every row."""
        batch, width = tokens.shape
        keys = np.zeros((1, batch, width, WIDTH), dtype=np.float32)
        answer = self._answers[batch]
        return StepOutput(
            answer if width == 1 else np.broadcast_to(answer, (batch, width, self.vocab_size)), keys, keys
        )


class NoRecorder:
    """Records nothing."""

    def emit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> bool:
        """Forget it."""
        return True

    def put_blob(self, data: bytes) -> str:
        """Forget it."""
        return ""


def requests(count: int, *, tokens: int, temperature: float = 0.0) -> list[GenerationRequest]:
    """Prompts of 32 tokens."""
    sampling = Sampling(max_tokens=tokens, temperature=temperature)
    return [GenerationRequest(f"s{n}", "t", tuple([n + 1] * 32), sampling) for n in range(count)]


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("vocabulary", [629, 4096])
def test_step_overhead(rows: int, vocabulary: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Microseconds of a step that are not the model's: plan, inputs, choice with evidence, recording to memory."""
    recorder = ListRecorder()
    with Engine(ToyModel(FreeExecutor(vocabulary, 2048)), SCHEDULING, recorder) as engine:
        for handle in [engine.submit(request) for request in requests(rows, tokens=100)]:
            handle.wait(60)
    steps = [
        (columns["duration_us"] - sum(payload["calls_us"]), payload["plan_us"])
        for name, payload, columns in recorder.events
        if name == "engine.step" and columns["batch_size"] == rows
    ]
    overhead, plan = (statistics.median(column) for column in zip(*steps[5:], strict=True))
    with capsys.disabled():
        print(
            f"\nengine overhead a step: rows {rows:2}, vocabulary {vocabulary:4}: {overhead:.0f} us (plan {plan:.0f})"
        )


@pytest.mark.slow
def test_recording_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CPU and wall time of 32 rows of the 5.0M-parameter comparison model, recorded against not, in pairs."""
    from runtime.backends.eager import EagerExecutor
    from runtime.models.random_checkpoint import random_checkpoint
    from traces.recorder import Recorder

    folder = random_checkpoint(
        tmp_path / "model",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_positions=2048,
    )
    executor = EagerExecutor.from_checkpoint(folder, bounds=Bounds(max_batch=64, max_tokens=512, max_context=2048))
    with Recorder(tmp_path / "ledger", run_id="run_bench", component="engine") as recorder:
        cost = compare(lambda: Engine(ToyModel(executor), SCHEDULING, recorder), executor, rounds=8)
    with capsys.disabled():
        print(f"\nrecording at {ROWS} rows: CPU {cost[0]:+.1%}, wall {cost[1]:+.1%} (medians of paired rounds)")


def compare(recorded: Callable[[], Engine], executor: Any, *, rounds: int) -> tuple[float, float]:
    """Return the relative CPU and wall cost of the recorded engine."""
    cpu: list[float] = []
    wall: list[float] = []
    with recorded() as one, Engine(ToyModel(executor), SCHEDULING, NoRecorder()) as other:
        for number in range(rounds + 1):
            order = (one, other) if number % 2 else (other, one)
            spent = {engine: spend(engine, seed=number) for engine in order}
            if number:  # the first round warms up
                cpu.append(spent[one][0] / spent[other][0] - 1)
                wall.append(spent[one][1] / spent[other][1] - 1)
    return statistics.median(cpu), statistics.median(wall)


def spend(engine: Engine, *, seed: int) -> tuple[float, float]:
    """CPU and wall seconds of one round."""
    draw = np.random.default_rng(seed)
    began = time.process_time(), time.perf_counter()
    handles = [
        engine.submit(
            GenerationRequest(f"s{n}", "t", tuple(draw.integers(0, 4096, 32).tolist()), Sampling(max_tokens=64))
        )
        for n in range(ROWS)
    ]
    for handle in handles:
        handle.wait(120)
    return time.process_time() - began[0], time.perf_counter() - began[1]
