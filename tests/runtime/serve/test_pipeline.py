"""A request goes through the ten stages, and a replay of it from its record is the same request."""

from __future__ import annotations

import json

import pytest

from manifests.run import DIMENSIONS, Pins, RunManifest
from runtime.serve.envelope import RequestEnvelope
from tests.runtime.serve.desk import PACKAGES, Desk, envelope, questions

STAGES = ["b01", "b02", "b03", "b04", "b05", "b06", "b08", "b09", "b10"]


def stages_of(desk: Desk) -> list[str]:
    return [event.stage.value for event in desk.recorder.of("stage.completed")]


def test_a_policy_question_is_answered_with_its_source(desk: Desk) -> None:
    question = questions("policy")[0]
    outcome = desk.ask(envelope(question))
    assert outcome.failure is None
    assert outcome.response["result"] == json.loads(question.expected[0])
    assert [one["source"] for one in outcome.response["citations"]] == [question.article]
    assert stages_of(desk) == STAGES
    assert desk.recorder.types()[-1] == "request.terminal"
    assert outcome.response["usage"]["generations"] == 1
    assert sum(outcome.response["timing"][name] for name in ("queueing", "prefill", "decode")) > 0


def test_a_lookup_calls_the_tool_between_two_generations(desk: Desk) -> None:
    question = questions("lookup")[0]
    outcome = desk.ask(envelope(question))
    assert outcome.failure is None
    assert outcome.response["result"] == json.loads(question.expected[1])
    assert [tool["tool"] for tool in outcome.response["tools"]] == ["lookup_account"]
    assert stages_of(desk) == [*STAGES[:6], "b07", *STAGES[3:]]


def test_every_prompt_is_a_prefix_of_the_next_turns_prompt(desk: Desk) -> None:
    desk.ask(envelope(questions("lookup")[0]))
    first, second = desk.service.requests
    assert second.prompt[: len(first.prompt)] == first.prompt


def test_the_engine_is_told_priority_tenant_and_deadline(desk: Desk) -> None:
    question = questions("policy")[0]
    desk.ask(envelope(question, priority=3, timeout_us=5_000_000))
    (request,) = desk.service.requests
    assert (request.priority, request.tenant) == (3, question.tenant)
    assert request.deadline_us is not None and 0 < request.deadline_us < 5_000_000


def test_a_ticket_is_written_once_and_audited_before_it_is(desk: Desk) -> None:
    outcome = desk.ask(envelope(questions("ticket")[0]))
    assert outcome.failure is None
    assert outcome.response["tools"][-1]["tool"] == "create_ticket"
    told = [
        (event.event_type, event.payload.get("phase"))
        for event in desk.recorder.events
        if event.durability == "mandatory"
        and event.event_type in ("tool.authorized", "effect.performed", "request.terminal")
    ]
    assert told == [
        ("tool.authorized", None),
        ("effect.performed", "intended"),
        ("effect.performed", "performed"),
        ("request.terminal", None),
    ]


def test_the_manifest_names_all_eight_dimensions_and_the_context(desk: Desk) -> None:
    outcome = desk.ask(envelope(questions("policy")[0]))
    last = desk.recorder.of("request.manifest")[-1]
    pins = Pins.from_documents(json.loads(desk.recorder.read(last.result_ref)))
    manifest = RunManifest.from_bytes(desk.recorder.read(last.input_ref), last.manifest_digest)
    assert pins == outcome.pins
    assert all(getattr(manifest, name) == pins.dimension(name).digest for name in DIMENSIONS)
    assert pins.context.context_digest is not None
    assert pins.artifact.package_digest == PACKAGES["primary"]


@pytest.mark.parametrize("kind", ["policy", "lookup", "ticket"])
def test_a_replay_from_the_record_repeats_every_stage_and_writes_nothing(desk: Desk, kind: str) -> None:
    original = desk.ask(envelope(questions(kind)[0], memory={"write": True}, idempotency_key="once-and-for-all"))
    assert original.failure is None
    tickets = desk.deployment.crm_path.read_bytes()
    again = desk.replay(original.response["request"])
    assert again.documents == original.documents
    assert again.response | {"timing": None} == original.response | {"timing": None}
    assert again.pins == original.pins
    assert desk.deployment.crm_path.read_bytes() == tickets


def test_a_completion_runs_without_retrieval_tools_or_grammar(desk: Desk) -> None:
    desk.service.answer = lambda request, text: "more and more"
    request = RequestEnvelope.model_validate_json(
        json.dumps({
            "tenant": "aurora", "actor": "load", "task": {"kind": "completion", "prompt_tokens": [5, 6, 7]},
            "generation": {"max_tokens": 4},
        })
    )  # fmt: skip
    outcome = desk.ask(request)
    assert outcome.failure is None
    assert len(outcome.response["result"]["tokens"]) <= 4
    assert desk.service.requests[0].prompt == (5, 6, 7)
    assert desk.service.requests[0].grammar is None
    assert "retrieval" not in {event.payload["kind"] for event in desk.recorder.of("effect.performed")}
    assert stages_of(desk) == STAGES


def test_stages_read_their_settings_from_the_pins(desk: Desk) -> None:
    original = desk.ask(envelope(questions("policy")[0]))
    desk.service.requests.clear()
    desk.replay(original.response["request"], repin=lambda pins: pins.set("generation.temperature", "0.8"))
    assert desk.service.requests[0].sampling.temperature == 0.8


def test_a_broken_citation_is_repaired_once_under_a_tighter_grammar(desk: Desk) -> None:
    question = questions("policy")[0]
    good, answers = question.expected[0], []

    def answer(request: object, text: str) -> str:
        answers.append(text)
        return good if len(answers) == 2 else good.replace(str(question.article), "P-9999")

    desk.service.answer = answer
    outcome = desk.ask(envelope(question))
    assert outcome.failure is None
    assert outcome.response["policy"]["repairs"] == 1
    assert "P-9999" not in json.dumps(outcome.response)
    first, second = (request.grammar or "" for request in desk.service.requests)
    assert '"enum"' in second and str(question.article) in second and str(question.article) not in first
