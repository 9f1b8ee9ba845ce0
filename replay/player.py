"""How is one recorded request run again?  The request path itself, on recorded effects and recorded plans.

Nothing live is started: no tool server, no clock, no index unless another one is asked for.  Every effect is answered
from the record; a call that was never recorded fails with the nearest recorded call.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from eval.records import GenerationRecord, RequestRecord
from manifests.diff import diff
from manifests.hardware import HardwareManifest
from manifests.run import Pins
from manifests.scheduling import SchedulingManifest
from replay.errors import IncompleteRecord, PinRefused
from replay.generation_services import AuditedGenerations, Generated, PlayedGenerations
from replay.generations import (
    RecordedSequence,
    generation_record,
    load_refusals,
    load_sequences,
    recorded_generations,
    shapes_by_token,
)
from replay.jobs import ReplayMode
from replay.judge import judge
from replay.listener import Listener
from replay.models import Models
from replay.packages import PackageChoice
from replay.records import RecordedRequest, recorded_request, to_request_record
from replay.routes import standing_routes
from replay.substitutes import Substitution, Way, apply_to_pins, pin_changes
from replay.verdict import ReplayVerdict
from replay.worlds import Substitutes
from runtime.backends.errors import CapacityExhausted
from runtime.effects import RecordedEffects
from runtime.engine.errors import SettingsRefused
from runtime.engine.generation import GenerationResult
from runtime.engine.plan import StepPlan
from runtime.serve.deployment import DeploymentDocument
from runtime.serve.envelope import RequestEnvelope
from runtime.serve.pipeline import run_request
from runtime.serve.services import RequestIdentity, RouteBinding, Services, ToolFacts, request_columns
from traces.failures import ClassifiedError
from traces.stages import Stage

if TYPE_CHECKING:
    from traces.envelope import TraceEvent
    from traces.ledger.ledger import Ledger
    from traces.recorder import Recorder


BY_CALLER = ("cancelled", "caller")
"""Finish reason and origin of a generation whose caller went away."""


LEFT_EFFECTS = frozenset({"cancelled", "ambiguous_side_effect"})
"""Error types of an effect whose caller went away while it was performed."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for all requests of one replayed run.

    recorder    records the child run
    deployment  as it was recorded with the run
    shared      events of the run that belong to no request
    plans       step plans by engine
    steps       engine steps that the run recorded
    ready       results of generations that were computed together, by sequence id
    hardware    the worker's own hardware pins
    packages    which package runs instead of a recorded one
    """

    ledger: Ledger
    recorder: Recorder
    deployment: DeploymentDocument
    shared: Sequence[TraceEvent]
    models: Models
    plans: Mapping[str, Sequence[StepPlan]]
    steps: int
    ready: Mapping[str, GenerationResult]
    hardware: HardwareManifest
    packages: PackageChoice
    mode: ReplayMode
    substitutes: Substitutes

    @property
    def substitutions(self) -> tuple[Substitution, ...]:
        """What the caller set."""
        return self.substitutes.substitutions

    @property
    def rescheduled(self) -> bool:
        """Whether the scheduling rules were changed: recorded plans do not fit others."""
        return any(one.way is Way.RESCHEDULE for one in self.substitutions)


class Player:
    """Runs requests of one recorded run again, one after the other, into one child run."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    async def replay(self, request: RecordedRequest) -> ReplayVerdict:
        """Run one request again, record it and the verdict; raises IncompleteRecord, PinRefused, ClassifiedError."""
        setting = self._setting
        if request.envelope is None:
            raise IncompleteRecord(
                f"request {request.request_ref} ended before its envelope was recorded", missing="record.envelope"
            )
        sequences = load_sequences(setting.ledger, request.events)
        passage = _Passage(setting, request, sequences)
        await passage.run(RequestEnvelope.model_validate_json(request.envelope))
        pins = passage.pins()
        verdict = judge(
            to_request_record(request, recorded_generations(sequences, setting.plans)),
            passage.record(),
            mode=setting.mode,
            changes=pin_changes(request.pins, pins, setting.substitutions),
            differences=diff(request.pins, pins) if request.pins is not None and pins is not None else (),
            rescheduled=setting.rescheduled,
        )
        verdict = replace(verdict, replay={**verdict.replay, "slice": passage.slice_document()})
        document = verdict.to_document()
        setting.recorder.commit(
            "replay.verdict",
            payload={name: document[name] for name in document if name not in ("original", "replay", "pins_changed")},
            request_ref=request.request_ref,
            track="B",
            status="ok" if verdict.verdict in ("exact", "within_tolerance") else "degraded",
            result_ref=setting.recorder.put_blob(json.dumps(document, sort_keys=True).encode()),
        )
        return verdict


class _Passage:
    """One request on its way through the request path for the second time."""

    def __init__(self, setting: Setting, request: RecordedRequest, sequences: Sequence[RecordedSequence]) -> None:
        self._setting = setting
        self._request = request
        self._listener = Listener(setting.recorder)
        self._recorded = {sequence.sequence_id: sequence for sequence in sequences}
        self._refused = load_refusals(request.events)
        self._done: list[Generated] = []
        self._obstacles: list[ClassifiedError] = []
        self._left_in = cancelled_in(request)

    async def run(self, envelope: RequestEnvelope) -> None:
        """Send the request through the ten stages; a cancelled caller's request ends as it did."""
        try:
            await run_request(envelope, self._services())
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the replay itself is being stopped, not the replayed caller
        if self._obstacles:
            raise IncompleteRecord(self._obstacles[0].message, missing="record.engine_step", fix=self._obstacles[0].fix)
        self._record_generations()

    def record(self) -> RequestRecord:
        """Return what eval judges of the replay."""
        return to_request_record(self._again(), [self._generation(one) for one in self._done])

    def slice_document(self) -> dict[str, int] | None:
        """Return how much of the recorded schedule the replay ran; None where no model ran."""
        used = [one.slice for one in self._done if one.slice is not None]
        if not used:
            return None
        return {
            "steps": len({step for one in used for step in one.steps}),
            "recorded_steps": self._setting.steps,
            "own_calls": sum(one.own_calls for one in used),
            "prefix_calls": sum(one.prefix_calls for one in used),
            "past_calls": sum(one.past_calls for one in used),
        }

    def pins(self) -> Pins | None:
        """Return the pins that the replay ran under."""
        return self._again().pins

    def _again(self) -> RecordedRequest:
        events, run_id = self._listener.events, self._setting.recorder.run_id
        return recorded_request(self._listener.read_blob, run_id, self._request.request_ref, events)

    def _services(self) -> Services:
        """Return services of which nothing is live."""
        setting, request = self._setting, self._request
        accepted = request.accepted
        if accepted is None or accepted.trace_id is None:
            raise IncompleteRecord("the request's acceptance was not recorded", missing="request.accepted")
        identity = RequestIdentity(
            request_ref=request.request_ref,
            trace_id=accepted.trace_id,
            arrived_us=int(accepted.payload["arrived_us"]),
        )
        effects = RecordedEffects(
            request.events,
            read_blob=setting.ledger.read_blob,
            recorder=self._listener,
            columns=request_columns(identity),
            overrides=setting.substitutes.overrides,
            anew=setting.substitutes.anew,
            at_frontier=setting.substitutes.frontier,
        )
        return Services(
            deployment=setting.deployment,
            effects=effects,
            recorder=self._listener,
            identity=identity,
            routes=self._routes(),
            world=setting.substitutes.world(identity.arrived_us),
            tool_facts=tool_facts(request.pins),
            repin=setting.substitutes.repin,
            mode=setting.mode,
            parent=request.request_ref,
            cancelled_in=None if self._left_working() else self._left_in,
        )

    def _left_working(self) -> bool:
        """Whether the caller left during a generation or an effect: both repeat that from their own records."""
        results = [sequence.result for sequence in self._recorded.values()]
        if any(one is not None and (one.finish_reason, one.cancel_origin) == BY_CALLER for one in results):
            return True
        return any(event.error_type in LEFT_EFFECTS for event in self._request.of_type("effect.performed"))

    def _routes(self) -> dict[str, RouteBinding]:
        """Bind every route as it stood at the request's arrival, or to the package that stands in for it."""
        setting, request = self._setting, self._request
        standing = standing_routes(
            setting.ledger, request, setting.shared, default_route=setting.deployment.default_route
        )
        bindings: dict[str, RouteBinding] = {}
        for name, route in standing.items():
            package = route.package
            if request.pins is not None:
                package = setting.packages.choose(route.package, request.pins)
            if setting.substitutions and setting.mode != "audit":
                self._check_engine(package, route.engine_id)
            bindings[name] = setting.models.bind(
                name,
                package,
                self._service(package, route.engine_id),
                hardware=setting.hardware,
                scheduling=self._scheduling(),
                engine_id=route.engine_id,
                audited=request.pins if setting.mode == "audit" else None,
            )
        return bindings

    def _check_engine(self, package: str, engine_id: str) -> None:
        """Refuse pins under which no engine could run the package: PinRefused names the first that may be to blame."""
        substitutions = self._setting.substitutions
        try:
            self._setting.models.player(package, engine_id, self._scheduling())
        except (SettingsRefused, CapacityExhausted) as error:
            steering = [one for one in substitutions if one.way in (Way.RESCHEDULE, Way.PACKAGE)]
            raise PinRefused(error.message, pin=(steering or substitutions)[0].pin, fix=error.fix) from error

    def _scheduling(self) -> SchedulingManifest:
        """Return the scheduling rules: the recorded ones, or as they were changed."""
        setting, pins = self._setting, self._request.pins
        if pins is None:
            return setting.deployment.scheduling
        return apply_to_pins(pins, setting.substitutions, ways=frozenset({Way.RESCHEDULE})).scheduling

    def _service(self, package: str, engine_id: str) -> PlayedGenerations | AuditedGenerations:
        setting = self._setting
        if setting.mode == "audit":
            return AuditedGenerations(
                recorded=self._recorded,
                done=self._done,
                unseen=self._unseen,
                obstacles=self._obstacles,
                refused=self._refused,
            )
        mode: ReplayMode = "alone" if setting.rescheduled else setting.mode
        models, scheduling = setting.models, self._scheduling()
        return PlayedGenerations(
            player=lambda engine: models.player(package, engine, scheduling),
            engine_id=engine_id,
            recorded=self._recorded,
            mode=mode,
            done=self._done,
            unseen=self._unseen,
            obstacles=self._obstacles,
            ready=setting.ready,
            refused=self._refused,
        )

    @property
    def _unseen(self) -> bool:
        """Whether the recorded caller went away before any token reached it."""
        return self._left_in is not None and self._left_in[0] == Stage.PREFILL.value

    def _generation(self, generated: Generated) -> GenerationRecord:
        """Return what eval judges of one replayed generation, with the shapes that it ran in."""
        followed = generated.followed
        if followed is not None:
            plans = self._setting.plans.get(followed.engine_id, ())
            shapes = shapes_by_token(plans, followed.index, generated.result.steps)
            return generation_record(generated.request, generated.result, shapes)
        if self._setting.rescheduled:  # other rules: every token has another schedule, whatever its shapes
            rules = self._scheduling().digest
            shapes = [[["rescheduled", rules]] for _ in generated.result.records]
            return generation_record(generated.request, generated.result, shapes)
        return generation_record(generated.request, generated.result)

    def _record_generations(self) -> None:
        """Write the replayed generations into the child run as an engine would, so that every reader finds them."""
        if self._setting.mode == "audit":
            return  # nothing was generated
        for index, generated in enumerate(self._done):
            request, result = generated.request, generated.result
            columns: dict[str, Any] = {
                "track": "B",
                "engine_id": f"replay-{request.sequence_id}",
                "request_ref": request.request_ref,
                "tenant_ref": request.tenant,
            }
            naming = {"index": index, "sequence_id": request.sequence_id}
            self._listener.emit(
                "engine.sequence",
                payload={"phase": "admitted", **naming},
                input_ref=self._listener.put_blob(request.encode()),
                **columns,
            )
            self._listener.emit(
                "engine.sequence",
                payload={
                    "phase": "finished",
                    **naming,
                    "queue_us": result.queue_us,
                    "prefill_us": result.prefill_us,
                    "decode_us": result.decode_us,
                    "preemptions": result.preemptions,
                    "cancel_origin": result.cancel_origin,
                },
                input_tokens=result.prompt_tokens,
                output_tokens=len(result.tokens),
                kv_hit_tokens=result.cached_tokens,
                first_token_us=result.first_token_us,
                finish_reason=result.finish_reason,
                result_ref=self._listener.put_blob(result.encode()),
                **columns,
            )


def cancelled_in(request: RecordedRequest) -> tuple[str, int] | None:
    """Return the stage and pass in which the recorded caller went away; None when it stayed."""
    for event in request.of_type("stage.failed"):
        if event.error_type == "cancelled" and event.stage is not None:
            return event.stage.value, int(event.payload.get("ordinal", 0))
    return None


def tool_facts(pins: Pins | None) -> ToolFacts:
    """Return what the tool server had said of itself when the request was recorded."""
    if pins is None or pins.tools.server == "none":
        return ToolFacts()
    tools = pins.tools
    return ToolFacts(server=tools.server, server_version=tools.server_version, protocol_version=tools.protocol_version)
