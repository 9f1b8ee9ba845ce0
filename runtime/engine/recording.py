"""What does an engine write into the ledger?  Its start, a line of the sequence table twice a sequence, and every plan.

All of it is optional durability: the engine never waits for the disk.  What could not be written is counted by the
recorder, and a replay that needs it says which step is missing.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from manifests.scheduling import SchedulingManifest
from runtime.engine.account import CallTimes
from runtime.engine.generation import GenerationRequest, GenerationResult
from runtime.engine.plan import StepPlan
from runtime.engine.sampling import DIGEST_ALGORITHM, SAMPLER_ALGORITHM
from runtime.engine.settings import Settings
from traces.failures import ClassifiedError, TelemetryPersistenceError


class EventRecorder(Protocol):
    """What is needed of `traces.recorder.Recorder`."""

    def emit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> bool: ...
    def put_blob(self, data: bytes) -> str: ...


class StepTimes:
    """When a step began, on the monotonic clock, and where its microseconds went."""

    __slots__ = ("calls", "plan_us", "started_us", "total_us")

    def __init__(self, started_us: int) -> None:
        self.started_us = started_us
        self.plan_us = 0
        self.calls: list[CallTimes] = []
        self.total_us = 0


class EngineJournal:
    """Writes one engine's events."""

    def __init__(self, recorder: EventRecorder, *, engine_id: str) -> None:
        self._recorder = recorder
        self._engine_id = engine_id

    def started(self, scheduling: SchedulingManifest, settings: Settings, *, backend: str, precision: str) -> None:
        """Record the rules that all plans of this engine were made under."""
        self._recorder.emit(
            "engine.started",
            payload={
                "scheduling": scheduling.to_document(),
                "scheduling_digest": scheduling.digest,
                "backend": backend,
                "precision": precision,
                "longest_sequence": settings.longest_sequence,
                "longest_chunk": settings.longest_chunk,
                "sampler_algorithm": SAMPLER_ALGORITHM,
                "digest_algorithm": DIGEST_ALGORITHM,
            },
            track="B",
            engine_id=self._engine_id,
        )

    def store(self, data: bytes) -> str | None:
        """Keep evidence; None when the ledger does not take it."""
        try:
            return self._recorder.put_blob(data)
        except TelemetryPersistenceError:
            return None

    def admitted(self, index: int, request: GenerationRequest, *, submitted_us: int, input_ref: str | None) -> None:
        """Record which request a sequence index stands for, and what ordered it; the time is the engine's clock."""
        self._recorder.emit(
            "engine.sequence",
            payload={
                "phase": "admitted",
                "index": index,
                "sequence_id": request.sequence_id,
                "priority": request.priority,
                "deadline_us": request.deadline_us,
                "submitted_us": submitted_us,
            },
            track="B",
            engine_id=self._engine_id,
            request_ref=request.request_ref,
            tenant_ref=request.tenant,
            input_tokens=len(request.prompt),
            input_ref=input_ref,
        )

    def refused(self, request: GenerationRequest, refusal: ClassifiedError, *, input_ref: str | None) -> None:
        """Record a sequence that the queue did not take; it has no index, because no plan knows it."""
        self._recorder.emit(
            "engine.refused",
            payload={"sequence_id": request.sequence_id} | refusal.to_payload(),
            track="B",
            engine_id=self._engine_id,
            request_ref=request.request_ref,
            tenant_ref=request.tenant,
            input_tokens=len(request.prompt),
            input_ref=input_ref,
            failure_class=refusal.failure_class.value,
            error_type=refusal.error_type,
            status="error",
        )

    def finished(self, index: int, request: GenerationRequest, result: GenerationResult, *, total_us: int) -> None:
        """Record a sequence's end; the result with its per-token evidence is the event's result_ref."""
        status = {"stop": "ok", "length": "ok", "cancelled": "cancelled", "deadline": "partial", "error": "error"}
        self._recorder.emit(
            "engine.sequence",
            payload={
                "phase": "finished",
                "index": index,
                "sequence_id": request.sequence_id,
                "queue_us": result.queue_us,
                "prefill_us": result.prefill_us,
                "decode_us": result.decode_us,
                "preemptions": result.preemptions,
                "cancel_origin": result.cancel_origin,
                "partial": result.partial,
                "latency": None if result.latency is None else msgspec.structs.asdict(result.latency),
            },
            track="B",
            engine_id=self._engine_id,
            request_ref=request.request_ref,
            tenant_ref=request.tenant,
            duration_us=total_us,
            input_tokens=result.prompt_tokens,
            output_tokens=len(result.tokens),
            kv_hit_tokens=result.cached_tokens,
            first_token_us=result.first_token_us,
            finish_reason=result.finish_reason,
            failure_class=result.error,
            error_type=result.error_type,
            status=status[result.finish_reason],
            result_ref=self.store(result.encode()),
        )

    def stepped(self, plan: StepPlan, times: StepTimes, *, queue_depth: int, kv_blocks: int, sampled: int) -> None:
        """Record a step: the plan as text, its times, and the figures that charts want as columns."""
        self._recorder.emit(
            "engine.step",
            payload={
                "plan": plan.encode(),
                "plan_us": times.plan_us,
                "calls_us": [one.ran_us for one in times.calls],
                "choose_us": sum(one.chose_us for one in times.calls),
                "deliver_us": sum(one.gave_us for one in times.calls),
            },
            track="B",
            engine_id=self._engine_id,
            step=plan.step,
            mono_us=times.started_us,
            duration_us=times.total_us,
            batch_size=plan.row_count,
            queue_depth=queue_depth,
            kv_blocks=kv_blocks,
            input_tokens=plan.token_count,
            output_tokens=sampled,
        )
