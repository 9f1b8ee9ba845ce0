"""One-shot requests end exactly once, their times add up, and each replays alone from its call's shape, to the bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load

from runtime.backends.errors import InputRefused
from runtime.backends.one_shot import array_digest, fixture_inputs
from runtime.backends.tensor_contract import Arrays, TensorContract, TensorRule
from runtime.engine.assembly import run_again
from runtime.engine.batching import BatchingSettings
from runtime.engine.errors import SequenceRefused
from runtime.engine.oneshot import OneShotEngine, OneShotResult
from runtime.prepare.load import load_one_shot
from runtime.prepare.pipeline import prepare
from runtime.prepare.store import PackageStore
from tests.runtime.one_shot_models import save_embedder
from traces.failures import FailureClass

CONTRACT = TensorContract(
    inputs=(TensorRule(name="x", dtype="float32", shape=("B", "T")),),
    outputs=(TensorRule(name="y", dtype="float32", shape=("B", "T")),),
    symbols={"B": (2, 8), "T": (1, 4)},
)


class Doubler:
    """Answers twice its input, when its gate is open; keeps the shapes of its calls."""

    backend, precision, threads, contract = "toy", "float32", 1, CONTRACT

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.calls: list[tuple[int, ...]] = []

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        self.entered.set()
        self.gate.wait(timeout=30)
        self.contract.check(inputs)
        self.calls.append(inputs["x"].shape)
        if np.isnan(inputs["x"]).any():
            raise RuntimeError("not a number")
        return {"y": inputs["x"] * 2}

    def close(self) -> None: ...


class Events:
    """Keeps events and blobs in memory."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}

    def emit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> bool:
        self.events.append({"event_type": event_type, "payload": payload or {}, **columns})
        return True

    def put_blob(self, data: bytes) -> str:
        name = f"evidence://{len(self.blobs)}"
        self.blobs[name] = data
        return name


def row(value: float, width: int = 3) -> dict[str, NDArray[Any]]:
    return {"x": np.full((1, width), value, dtype=np.float32)}


@pytest.fixture
def toy() -> Iterator[tuple[Doubler, Events, OneShotEngine]]:
    executor, events = Doubler(), Events()
    settings = BatchingSettings(
        max_batch_size=4, max_queue_size=6, max_queue_delay_microseconds=2_000, preserve_ordering=True
    )
    engine = OneShotEngine([executor], settings, recorder=events)
    yield executor, events, engine
    executor.gate.set()
    engine.close()


def blocked(executor: Doubler, engine: OneShotEngine) -> Future[OneShotResult]:
    """Hold the only instance inside a call."""
    executor.gate.clear()
    executor.entered.clear()
    first = engine.submit(row(0), request_ref="first")
    assert executor.entered.wait(timeout=10)
    return first


def test_waiting_requests_share_a_call_and_get_their_own_rows(toy: tuple[Doubler, Events, OneShotEngine]) -> None:
    executor, events, engine = toy
    first = blocked(executor, engine)
    rest = [engine.submit(row(value), request_ref=f"r{value}") for value in range(1, 5)]
    executor.gate.set()
    for value, future in enumerate([first, *rest]):
        result = future.result(timeout=10)
        assert result.outputs is not None
        np.testing.assert_array_equal(result.outputs["y"], row(2 * value)["x"])
        parts = result.queue_us, result.batch_us, result.compute_us, result.delivery_us
        assert min(parts) >= 0
        assert result.total_us == sum(parts)
    assert executor.calls == [(2, 3), (4, 3)], "a lone request is padded to the smallest batch"
    recorded = [event for event in events.events if event["event_type"] == "oneshot.request"]
    assert [event["request_ref"] for event in recorded] == ["first", "r1", "r2", "r3", "r4"], "order kept"
    assert all(event["duration_us"] == sum(event["payload"][f"{p}_us"] for p in PARTS) for event in recorded)


PARTS = ("queue", "batch", "compute", "delivery")


def test_a_full_queue_is_a_capacity_refusal_with_a_time_to_come_back(
    toy: tuple[Doubler, Events, OneShotEngine],
) -> None:
    executor, _, engine = toy
    blocked(executor, engine)
    for index in range(6):
        engine.submit(row(index), request_ref=f"r{index}")
    with pytest.raises(SequenceRefused) as caught:
        engine.submit(row(9), request_ref="one too many")
    assert caught.value.failure_class is FailureClass.CAPACITY_ADMISSION
    assert caught.value.evidence["retry_after_us"] > 0
    with pytest.raises(SequenceRefused, match="larger than a batch"):
        engine.submit({"x": np.zeros((5, 3), dtype=np.float32)}, request_ref="large")
    with pytest.raises(InputRefused):
        engine.submit({"x": np.zeros((1, 9), dtype=np.float32)}, request_ref="wide")


def test_cancelled_and_late_requests_end_once_and_leave_the_others_alone(
    toy: tuple[Doubler, Events, OneShotEngine],
) -> None:
    executor, events, engine = toy
    first = blocked(executor, engine)
    waits = engine.submit(row(1), request_ref="waits")
    late = engine.submit(row(2), request_ref="late", deadline_us=1)
    kept = engine.submit(row(3), request_ref="kept")
    assert engine.cancel("waits")
    assert engine.cancel("first"), "a running one loses its answer"
    assert not engine.cancel("waits")
    executor.gate.set()
    states = [future.result(timeout=10).status for future in (first, waits, late, kept)]
    assert states == ["cancelled", "cancelled", "deadline", "ok"]
    failure = late.result().failure
    assert failure is not None
    assert failure.failure_class is FailureClass.TIMEOUT_CANCELLATION
    ended = [event["request_ref"] for event in events.events if event["event_type"] == "oneshot.request"]
    assert sorted(ended) == ["first", "kept", "late", "waits"]


def test_a_failing_call_fails_its_members_and_no_other(toy: tuple[Doubler, Events, OneShotEngine]) -> None:
    _, _, engine = toy
    bad = engine.submit(row(float("nan")), request_ref="bad").result(timeout=10)
    good = engine.submit(row(1, width=2), request_ref="good").result(timeout=10)
    assert (bad.status, good.status) == ("error", "ok")
    assert bad.failure is not None
    assert bad.failure.failure_class is FailureClass.MODEL_PROVIDER


def test_closing_answers_what_waits_and_refuses_what_comes() -> None:
    engine = OneShotEngine(
        [Doubler(), Doubler()], BatchingSettings(instance_count=2, max_queue_delay_microseconds=10**7)
    )
    waits = engine.submit(row(1), request_ref="waits")
    engine.close()
    assert waits.result(timeout=1).status == "ok"
    with pytest.raises(SequenceRefused, match="closing"):
        engine.submit(row(1), request_ref="more")


@pytest.mark.parametrize("backend", ["eager", "onnxruntime", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_request_replays_alone_from_the_shape_of_its_call(tmp_path: Path, backend: str) -> None:
    store = PackageStore(tmp_path / "ledger")
    package = prepare(save_embedder(tmp_path / "embedder.pt2"), backend=backend, store=store).digest
    executors = [load_one_shot(store, package).executor for _ in range(2)]
    settings = BatchingSettings(max_batch_size=8, max_queue_delay_microseconds=20_000, instance_count=2)
    events = Events()
    engine = OneShotEngine(executors, settings, recorder=events)
    contract = engine.contract
    length = next(name for name in contract.symbols if name != contract.batch)
    futures: list[Future[OneShotResult]] = []
    for index in range(24):
        sizes = {str(contract.batch): 1 + index % 3, length: 5 + index % 2}
        inputs = fixture_inputs(contract, sizes, label=f"request {index}")
        futures.append(engine.submit(inputs, request_ref=f"r{index}"))
    results = [future.result(timeout=60) for future in futures]
    engine.close()
    assert all(result.status == "ok" for result in results)
    assert max(result.batch_size or 0 for result in results) > 3, "requests shared calls"
    again = load_one_shot(store, package).executor
    for event in (event for event in events.events if event["event_type"] == "oneshot.request"):
        told = event["payload"]
        inputs = load(events.blobs[event["input_ref"]])
        outputs = run_again(again, inputs, offset=told["offset"], padded=told["padded"], shape=told["shape"])
        assert {name: array_digest(value) for name, value in outputs.items()} == told["outputs"]
