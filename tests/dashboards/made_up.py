"""A small made-up ledger, written through the real recorder under a clock that the test sets."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from manifests.artifact import ArtifactManifest
from manifests.canonical import canonical_bytes, digest
from manifests.compiler import CompilerManifest
from manifests.context import ContextManifest
from manifests.generation import GenerationManifest
from manifests.hardware import HardwareManifest
from manifests.policy import PolicyManifest
from manifests.run import Pins
from manifests.scheduling import SchedulingManifest
from manifests.tools import ToolsManifest
from traces.ledger.ledger import Ledger
from traces.recorder import Recorder
from traces.stages import Stage, describe

RUN, REPLAY = "run_0192f0c1a2b37000a1b2c3d4e5f60001", "run_0192f0c1a2b37000a1b2c3d4e5f60002"
START_US = 1_790_000_000_000_000
CANARY = "<script>canary</script>"
"""Stands in recorded text: pages must show it as text."""
FAILED = {"status": "failed", "stage": "b07", "message": f"The tool did not answer {CANARY}"}


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.at_us = 0

    def __call__(self) -> tuple[int, int]:
        return START_US + self.at_us, self.at_us


def request_ref(number: int) -> str:
    """Name a made-up request."""
    return f"req_0192f0c1a2b37000a1b2c3d4{number:08x}"


def pins(*, precision: str = "float32", seed: int = 7) -> Pins:
    """Return eight made-up dimensions."""
    return Pins(
        artifact=ArtifactManifest(
            model="support-desk",
            family="llama",
            model_digest=digest(b"model"),
            package_digest=digest(precision.encode()),
        ),
        compiler=CompilerManifest(backend="inductor", backend_version="2.13.0", precision=precision),
        hardware=HardwareManifest(
            cpu_model="Example CPU", architecture="x86_64", cores=2, threads=1, memory_bytes=1 << 34, kernel="6.1"
        ),
        scheduling=SchedulingManifest(),
        generation=GenerationManifest(seed=seed, max_tokens=64),
        context=ContextManifest(index_digest=digest(b"index"), token_budget=640, ranking="bm25"),
        tools=ToolsManifest(server="replaylab-crm", server_version="1"),
        policy=PolicyManifest(policy_version="2026-06", repair_limit=1),
    )


def write_ledger(path: Path, *, requests: int = 4) -> Ledger:
    """Write one live run and one replay of it, and drain them.

    The second request failed at its tool; the third had other pins; the replay of the last one parted in the bits.
    """
    clock = Clock()
    with Recorder(path, run_id=RUN, component="runtime", clock=clock) as recorder:
        recorder.commit("run.started", payload={"kind": "serve", "label": f"support-desk {CANARY}"})
        for number in range(requests):
            precision = "bfloat16" if number == 2 else "float32"
            _request(recorder, clock, number, start_us=number * 60_000, precision=precision)
        _steps(recorder, clock, requests)
        clock.at_us = requests * 60_000 + 400_000
        recorder.commit("run.completed", status="ok")
    with Recorder(path, run_id=REPLAY, component="replay", clock=clock) as recorder:
        base = clock.at_us = 30_000_000
        recorder.commit("run.started", payload={"kind": "replay", "parent_run": RUN, "mode": "faithful", "set": []})
        for number in range(requests):
            parted = number == requests - 1
            _request(recorder, clock, number, start_us=base + number * 50_000, precision="float32", parted=parted)
            recorder.commit("replay.verdict", request_ref=request_ref(number), payload=_verdict(parted=parted))
        recorder.commit("run.completed", status="ok")
    ledger = Ledger(path)
    ledger.drain()
    return ledger


def generation_result(number: int, *, parted: bool, tokens: int = 18) -> dict[str, Any]:
    """Return a generation result as the engine writes it; a parted one differs in bits from 6 and in tokens from 11."""
    draw = random.Random(number)
    records: list[list[Any]] = []
    for index in range(tokens):
        token, margin = draw.randrange(500), draw.uniform(0.02, 6)
        if parted and index >= 11:
            token += 1
        name = f"{number}-{index}" + ("-other" if parted and index >= 6 else "")
        row = hashlib.sha256(name.encode()).hexdigest()[:32]
        records.append([token, row, -draw.random(), margin, number * 3 + index, 120 + index, 9_000 + index * 4_000])
    return {
        "sequence_id": f"{request_ref(number)}/0",
        "tokens": [record[0] for record in records],
        "records": records,
        "finish_reason": "stop",
        "queue_us": 3_000,
        "prefill_us": 6_000,
        "decode_us": tokens * 4_000,
        "first_token_us": 9_000,
        "prompt_tokens": 120,
        "cached_tokens": 32,
        "steps": [number * 3 + index for index in range(tokens)],
        "preemptions": 0,
    }


def _request(
    recorder: Recorder, clock: Clock, number: int, *, start_us: int, precision: str, parted: bool = False
) -> None:
    common: dict[str, Any] = {
        "request_ref": request_ref(number),
        "trace_id": f"{number + 1:032x}",
        "tenant_ref": f"tenant_{number % 2:024x}",
    }
    fails = number == 1
    clock.at_us = start_us
    spans = _spans(number)
    for stage, begin, end in spans:
        received = recorder.put_blob(canonical_bytes({"stage": stage.word, "request": number, "side": "in"}))
        clock.at_us = start_us + begin
        span = f"{number * 100 + stage.number:016x}"
        recorder.emit("stage.started", stage=stage, attempt=1, span_id=span, input_ref=received, **common)
        if stage is Stage.BOUNDARY:
            recorder.commit("request.accepted", input_ref=received, **common)
            _manifest(recorder, common, precision, number)
        clock.at_us = start_us + end
        if fails and stage is Stage.TOOLING:
            recorder.emit(
                "stage.failed", stage=stage, attempt=1, span_id=span, status="error", duration_us=end - begin,
                failure_class="tool_side_effect", error_type="tool_timeout",
                payload=FAILED, **common,
            )  # fmt: skip
            break
        _completed(recorder, stage, number, span=span, duration_us=end - begin, parted=parted, common=common)
        if stage is Stage.DECODE:
            _sequence(recorder, number, parted=parted, common=common)
    _effects(recorder, common, fails=fails)
    recorder.commit(
        "request.terminal",
        status="error" if fails else "ok",
        duration_us=clock.at_us - start_us,
        input_tokens=120,
        output_tokens=18,
        model_route="default",
        failure_class="tool_side_effect" if fails else None,
        payload=FAILED if fails else {"status": "ok"},
        **common,
    )


def _completed(
    recorder: Recorder, stage: Stage, number: int, *, span: str, duration_us: int, parted: bool, common: dict[str, Any]
) -> None:
    record = {name: f"{name} of {number}" for name in describe(stage).record}
    emitted = {"stage": stage.word, "request": number, "parted": parted and stage.number >= 5}
    recorder.emit(
        "stage.completed",
        stage=stage,
        attempt=1,
        span_id=span,
        status="ok",
        duration_us=duration_us,
        result_ref=recorder.put_blob(canonical_bytes(emitted)),
        payload={"record": record},
        **common,
    )


def _manifest(recorder: Recorder, common: dict[str, Any], precision: str, number: int) -> None:
    pinned = pins(precision=precision, seed=number)
    recorder.commit(
        "request.manifest",
        manifest_digest=pinned.manifest().digest,
        result_ref=recorder.put_blob(canonical_bytes(pinned.to_documents())),
        **common,
    )


def _sequence(recorder: Recorder, number: int, *, parted: bool, common: dict[str, Any]) -> None:
    recorder.emit(
        "engine.sequence",
        engine_id="engine-0",
        payload={"phase": "finished", "index": number},
        first_token_us=41_000 + number * 900,
        finish_reason="stop",
        kv_hit_tokens=32,
        result_ref=recorder.put_blob(json.dumps(generation_result(number, parted=parted)).encode()),
        **common,
    )


def _effects(recorder: Recorder, common: dict[str, Any], *, fails: bool) -> None:
    recorder.emit(
        "effect.performed", effect_origin="executed", side_effect="read", status="ok",
        payload={"kind": "retrieval", "phase": "performed", "ordinal": 0}, **common,
    )  # fmt: skip
    recorder.commit(
        "tool.authorized",
        tool_name="lookup_account",
        tool_version="1",
        policy_decision="allow",
        side_effect="read",
        **common,
    )
    if not fails:
        recorder.emit("tool.completed", tool_name="lookup_account", status="ok", duration_us=14_000, **common)


def _spans(number: int) -> list[tuple[Stage, int, int]]:
    stretch = 1 + number % 5 / 4
    plan = [
        (Stage.BOUNDARY, 0, 4), (Stage.CONTEXT, 3, 17), (Stage.ROUTING, 16, 18), (Stage.QUEUEING, 18, 30),
        (Stage.PREFILL, 30, 48), (Stage.DECODE, 48, 112), (Stage.TOOLING, 84, 104), (Stage.VALIDATION, 110, 121),
        (Stage.COMMITMENT, 120, 126), (Stage.RESPONSE, 126, 128),
    ]  # fmt: skip
    return [(stage, round(begin * 1_000 * stretch), round(end * 1_000 * stretch)) for stage, begin, end in plan]


def _steps(recorder: Recorder, clock: Clock, requests: int) -> None:
    for step in range(requests * 3 + 18):
        rows = [number for number in range(requests) if number * 3 <= step < number * 3 + 18][:8]
        first = [number for number in rows if number * 3 == step]
        decoding = [number for number in rows if number not in first]
        calls: list[list[Any]] = []
        if first:
            calls.append(["prefill", 1, 128, 64, first, [32], [88], []])
        if decoding:
            calls.append(["decode", 8, 1, 192, decoding, [120] * len(decoding), [], []])
        clock.at_us = 30_000 + step * 4_200
        recorder.emit(
            "engine.step", engine_id="engine-0", step=step, duration_us=3_100 + 700 * len(rows), batch_size=len(rows),
            payload={"plan": json.dumps([step, calls, [], [], [], []])},
        )  # fmt: skip


def _verdict(*, parted: bool) -> dict[str, Any]:
    if not parted:
        return {"verdict": "exact", "detail": "every layer is the same to the bit"}
    return {
        "verdict": "diverged", "layer": "bits", "stage": "b06", "token_index": 6,
        "detail": "the logits of token 6 differ",
    }  # fmt: skip
