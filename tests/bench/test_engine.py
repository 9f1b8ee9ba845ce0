"""What does the engine cost beside the model, and what does recording cost the engine?  Figures are printed only.

Recording is measured in pairs: the same requests through a recorded and an unrecorded engine on one executor, order
swapped each round, so that a busy machine weighs on both alike.
"""

from __future__ import annotations

import statistics
import threading
import time
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
from traces.recorder import Recorder

ROWS = 32
TOKENS = 64
SCHEDULING = SchedulingManifest(max_num_seqs=ROWS, max_num_batched_tokens=1024, num_blocks=1024, batch_sizes=(1, 8, 32))


class FreeExecutor(ToyExecutor):
    """Answers fixed logits at once: what remains of a step is the engine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.contract = InputContract.of(self.config, Bounds(max_batch=64, max_tokens=128, max_context=2048))
        self._row = np.random.default_rng(0).standard_normal((1, 1, self.vocab_size)).astype(np.float32)
        self._answers = {size: np.repeat(self._row, size, axis=0) for size in SCHEDULING.batch_sizes}

    def step(
        self, tokens: Any, positions: Any, slots: Any, context_lengths: Any, pool: Any, *, last: Any = None
    ) -> StepOutput:
        """The same logits for every row."""
        batch, width = tokens.shape
        keys = np.zeros((1, batch, width, WIDTH), dtype=np.float32)
        return StepOutput(self._answers[batch], keys, keys)


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


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_step_cpu(rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CPU microseconds of a decode step that are not the model's, by thread, with a real recorder; best of 8 rounds."""
    rounds: list[tuple[float, float]] = []
    with (
        Recorder(tmp_path, run_id="run_bench", component="engine") as recorder,
        Engine(ToyModel(FreeExecutor(4096, 2048)), SCHEDULING, recorder) as engine,
    ):
        for _ in range(8):
            recorder.flush()
            before = thread_seconds("engine-"), thread_seconds("outbox-")
            for handle in [engine.submit(request) for request in requests(rows, tokens=200)]:
                handle.wait(60)
            recorder.flush()
            after = thread_seconds("engine-"), thread_seconds("outbox-")
            rounds.append((after[0] - before[0], after[1] - before[1]))
    loop, writer = (min(column) / 200 * 1e6 for column in zip(*rounds, strict=True))
    with capsys.disabled():
        print(f"\nCPU of a step, rows {rows:2}: {loop:.0f} us in the engine's thread, {writer:.0f} us in the writer's")


def thread_seconds(prefix: str) -> float:
    """CPU seconds so far of the thread whose name begins so."""
    thread = next(thread for thread in threading.enumerate() if thread.name.startswith(prefix))
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_recording_cost(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cost of recording 32 rows of the 5.0M-parameter comparison model: by account, and in paired rounds."""
    from runtime.models.random_checkpoint import random_checkpoint
    from runtime.prepare.load import load_package
    from runtime.prepare.pipeline import prepare
    from runtime.prepare.store import PackageStore

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
    store = PackageStore(tmp_path / "ledger")
    model = load_package(store, prepare(folder, backend=backend, store=store).digest)
    with Recorder(tmp_path / "ledger", run_id="run_bench", component="engine") as recorder:
        watched = WatchedRecorder(recorder)
        cpu, wall, account, step_us = compare(model, watched, rounds=8)
    with capsys.disabled():
        print(
            f"\nrecording, {backend}, {ROWS} rows: {account:.2%} of CPU by account; paired rounds: CPU {cpu:+.1%}, "
            f"wall {wall:+.1%}; a step takes {step_us:.0f} us of CPU"
        )


class WatchedRecorder:
    """Counts the CPU time that the engine's thread spends in the recorder."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self.seconds = 0.0

    def emit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> bool:
        """Hand on, on the clock."""
        began = time.thread_time()
        kept = self._recorder.emit(event_type, payload=payload, **columns)
        self.seconds += time.thread_time() - began
        return bool(kept)

    def put_blob(self, data: bytes) -> str:
        """Hand on, on the clock."""
        began = time.thread_time()
        name = self._recorder.put_blob(data)
        self.seconds += time.thread_time() - began
        return str(name)

    def total(self) -> float:
        """CPU seconds of the recorder so far: in the engine's thread and in the writer's."""
        return self.seconds + thread_seconds("outbox-")


def compare(model: Any, recorder: WatchedRecorder, *, rounds: int) -> tuple[float, float, float, float]:
    """Return the relative cost of the recorded engine: CPU and wall (paired), CPU by account, and CPU us of a step."""
    cpu: list[float] = []
    wall: list[float] = []
    account: list[float] = []
    steps: list[float] = []
    with Engine(model, SCHEDULING, recorder) as one, Engine(model, SCHEDULING, NoRecorder()) as other:
        for number in range(rounds + 1):
            order = (one, other) if number % 2 else (other, one)
            before = recorder.total()
            spent = {engine: spend(engine, seed=number) for engine in order}
            if number:  # the first round warms up
                cpu.append(spent[one][0] / spent[other][0] - 1)
                wall.append(spent[one][1] / spent[other][1] - 1)
                recording = recorder.total() - before
                account.append(recording / (spent[one][0] - recording))
                steps.append(spent[other][0] / TOKENS * 1e6)
    return statistics.median(cpu), statistics.median(wall), statistics.median(account), statistics.median(steps)


def spend(engine: Engine, *, seed: int) -> tuple[float, float]:
    """CPU and wall seconds of one round."""
    draw = np.random.default_rng(seed)
    prompts = [tuple(draw.integers(0, 4096, 32).tolist()) for _ in range(ROWS)]
    began = time.process_time(), time.perf_counter()
    handles = [
        engine.submit(GenerationRequest(f"s{n}", "t", prompt, Sampling(max_tokens=TOKENS)))
        for n, prompt in enumerate(prompts)
    ]
    for handle in handles:
        handle.wait(120)
    return time.process_time() - began[0], time.perf_counter() - began[1]
