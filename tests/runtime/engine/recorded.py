"""A small workload through a live engine, and what a replay may know of it."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import Any

from manifests.scheduling import SchedulingManifest
from runtime.engine.generation import (
    GenerationRequest,
    GenerationResult,
    Sampling,
    TokenRecord,
    decode_request,
    decode_result,
)
from runtime.engine.loop import Engine
from runtime.engine.plan import SequenceEntry, StepPlan, decode_plan
from tests.runtime.engine.toy import ListRecorder, ToyModel


@dataclass
class Recording:
    """What an engine left behind."""

    requests: list[GenerationRequest]
    results: list[GenerationResult]
    plans: list[StepPlan]
    sequences: list[SequenceEntry]
    recorder: ListRecorder


def requests_with_shared_prefixes(
    count: int, *, seed: int, vocab_size: int, longest_output: int = 40, grammar: str | None = None, stop: int = 0
) -> list[GenerationRequest]:
    """Prompts of two tenants over one common text, greedy and sampled, some with a grammar."""
    draw = random.Random(seed)
    common = tuple(draw.randrange(vocab_size) for _ in range(70))
    requests: list[GenerationRequest] = []
    for number in range(count):
        own = tuple(draw.randrange(vocab_size) for _ in range(draw.randrange(1, 30)))
        sampling = Sampling(
            seed=number,
            temperature=draw.choice([0.0, 0.8]),
            top_k=draw.choice([None, 20]),
            top_p=draw.choice([1.0, 0.9]),
            max_tokens=draw.randrange(1, longest_output),
            stop_token_ids=(stop,),
        )
        requests.append(
            GenerationRequest(
                sequence_id=f"sequence-{number}",
                tenant=f"tenant-{number % 2}",
                prompt=common[: draw.randrange(1, 70)] + own,
                sampling=sampling,
                grammar=grammar if number % 4 == 3 else None,
            )
        )
    return requests


def record(
    model: ToyModel, scheduling: SchedulingManifest, requests: list[GenerationRequest], *, cancel_every: int = 0
) -> Recording:
    """Run requests in three waves, cancelling some after a few tokens; check that the cache ends empty."""
    recorder = ListRecorder()
    started = threading.Event()

    def note(_: TokenRecord) -> None:
        started.set()

    with Engine(model, scheduling, recorder) as engine:
        handles: list[Any] = []
        for number, request in enumerate(requests):
            if number and number % max(1, len(requests) // 3) == 0:
                started.clear()
                started.wait(5)  # the next wave arrives while the last one decodes
            handles.append(engine.submit(request, note))
            if cancel_every and number % cancel_every == cancel_every - 1:
                handles[number // 2].cancel("test")
        results = [handle.wait(120) for handle in handles]
    return Recording(requests, results, plans_of(recorder), sequences_of(recorder), recorder)


def plans_of(recorder: ListRecorder) -> list[StepPlan]:
    """Read the plans as a replay does."""
    return [decode_plan(payload["plan"]) for name, payload, _ in recorder.events if name == "engine.step"]


def sequences_of(recorder: ListRecorder) -> list[SequenceEntry]:
    """Read the sequence table as a replay does."""
    return [
        SequenceEntry(payload["index"], payload["sequence_id"])
        for name, payload, _ in recorder.events
        if name == "engine.sequence" and payload["phase"] == "admitted"
    ]


def stored_pair(recorder: ListRecorder, sequence_id: str) -> tuple[GenerationRequest, GenerationResult]:
    """Read one request and its result from the evidence that the events refer to."""
    lines = [
        columns
        for name, payload, columns in recorder.events
        if name == "engine.sequence" and payload["sequence_id"] == sequence_id
    ]
    request = decode_request(recorder.blobs[lines[0]["input_ref"]])
    return request, decode_result(recorder.blobs[lines[1]["result_ref"]])
