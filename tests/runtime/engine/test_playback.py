"""A sequence replays bit for bit from its slice of the schedule, without any other request's content."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from manifests.scheduling import SchedulingManifest
from runtime.engine.errors import EngineFailed, PlanMissing
from runtime.engine.generation import GenerationRequest, Sampling, TokenRecord
from runtime.engine.inputs import CallInputs
from runtime.engine.loop import Engine
from runtime.engine.playback import PlanPlayer, RecordedGeneration
from tests.runtime.engine.recorded import (
    Recording,
    plans_of,
    record,
    requests_with_shared_prefixes,
    sequences_of,
    stored_pair,
)
from tests.runtime.engine.toy import ListRecorder, ToyExecutor, ToyModel

SCHEDULING = SchedulingManifest(
    max_num_seqs=16, max_num_batched_tokens=64, num_blocks=34, batch_sizes=(1, 2, 4, 8, 16), watermark="0.02"
)
TIGHT = SchedulingManifest(max_num_seqs=8, max_num_batched_tokens=40, num_blocks=22, long_prefill_token_threshold=24)
STOP = 258
GRAMMAR = json.dumps(
    {
        "type": "object",
        "properties": {"answer": {"type": "string", "maxLength": 12}},
        "required": ["answer"],
        "additionalProperties": False,
    }
)
KINDS = ["float32-fused", "bfloat16-unfused", pytest.param("bfloat16-fused", marks=pytest.mark.slow)]


class RandomStandIns:
    """Fills other requests' rows with random tokens, positions, slots and context lengths."""

    def __init__(self, seed: int, *, vocab_size: int, slots: int) -> None:
        self._draw = np.random.default_rng(seed)
        self._vocab_size = vocab_size
        self._slots = slots

    def fill(self, inputs: CallInputs, row: int) -> None:
        """Everything but the row, which is written afterwards."""
        context = inputs.slots.shape[1]
        inputs.tokens[:] = self._draw.integers(0, self._vocab_size, inputs.tokens.shape)
        inputs.positions[:] = self._draw.integers(0, 200, inputs.positions.shape)
        inputs.slots[:] = self._draw.integers(0, self._slots, inputs.slots.shape)
        inputs.context_lengths[:] = self._draw.integers(0, context + 1, inputs.context_lengths.shape)

    def tail(self, count: int) -> list[int]:
        """Random tokens."""
        return self._draw.integers(0, self._vocab_size, count).tolist()


class Spy:
    """Hands everything on, and keeps every token that was fed."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.fed: set[int] = set()

    def step(self, tokens: Any, *rest: Any, **more: Any) -> Any:
        """Look, then run."""
        self.fed.update(np.unique(tokens).tolist())
        return self._executor.step(tokens, *rest, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random decoder."""
    from runtime.models.random_checkpoint import random_checkpoint

    return random_checkpoint(tmp_path_factory.mktemp("engine") / "model", hidden_size=128, head_dim=32)


def eager(checkpoint: Path, kind: str) -> ToyModel:
    """An eager executor of a precision and norm, with the checkpoint's tokenizer."""
    from tokenizers import Tokenizer

    from runtime.backends.eager import EagerExecutor

    precision, norm = kind.split("-")
    executor = EagerExecutor.from_checkpoint(checkpoint, precision=precision, norm=norm)  # type: ignore[arg-type]
    return ToyModel(executor, Tokenizer.from_file(str(checkpoint / "tokenizer.json")))


@pytest.fixture(scope="session", params=KINDS)
def busy(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[tuple[ToyModel, Recording]]:
    """A hundred concurrent requests on the eager backend: chunks, prefix hits, preemptions, cancellations, grammars."""
    model = eager(checkpoint, request.param)
    requests = requests_with_shared_prefixes(
        100, seed=11, vocab_size=256, longest_output=24, grammar=GRAMMAR, stop=STOP
    )
    yield model, record(model, SCHEDULING, requests, cancel_every=25)


def player(
    model: ToyModel, recording: Recording, scheduling: SchedulingManifest = SCHEDULING, **more: Any
) -> PlanPlayer:
    """A player over a recording."""
    return PlanPlayer(model.executor, model.tokenizer, scheduling, recording.plans, recording.sequences, **more)


def test_a_hundred_concurrent_requests_replay_bit_for_bit(busy: tuple[ToyModel, Recording]) -> None:
    """Every digest, log-probability, margin and token is equal, through all the schedule's hard cases."""
    model, recording = busy
    assert sum(result.preemptions for result in recording.results) > 3
    assert sum(result.cached_tokens for result in recording.results) > 500
    assert any(result.finish_reason == "cancelled" for result in recording.results)
    assert any(row.start and row.count > 1 for plan in recording.plans for call in plan.calls for row in call.rows)
    live = player(model, recording)
    for request, result in zip(recording.requests, recording.results, strict=True):
        playback = live.play(request, "faithful", result)
        assert playback.result.document() == result.document()
        assert playback.result.steps == result.steps
        assert playback.result.cached_tokens == result.cached_tokens
        assert playback.slice.past_calls == 0
        assert len(playback.slice.steps) < len(recording.plans)


def test_the_content_of_stand_ins_does_not_reach_the_replayed_row(busy: tuple[ToyModel, Recording]) -> None:
    """Random tokens, positions, slots and lengths in all other rows, and behind shared prefixes: equal bits."""
    model, recording = busy
    slots = (SCHEDULING.num_blocks + 1) * SCHEDULING.block_size
    stand_ins = RandomStandIns(5, vocab_size=320, slots=slots)
    noisy = player(model, recording, stand_ins=stand_ins)
    for request, result in list(zip(recording.requests, recording.results, strict=True))[::5]:
        assert noisy.replay(request, "faithful", result).document() == result.document()


def test_alone_is_another_schedule(busy: tuple[ToyModel, Recording]) -> None:
    """Without the recorded shapes the bits of some requests differ: what the schedule is recorded for."""
    model, recording = busy
    lonely = player(model, recording)
    pairs = list(zip(recording.requests, recording.results, strict=True))[:12]
    same = [lonely.replay(request, "alone", result).document() == result.document() for request, result in pairs]
    if model.executor.precision == "float32":
        assert not all(same)


def test_a_schedule_under_pressure_replays_on_the_toy() -> None:
    """Few blocks, small budget, short chunks: many preemptions, recomputed prefixes, hits on recomputed blocks."""
    for seed in range(4):
        model = ToyModel(ToyExecutor())
        requests = requests_with_shared_prefixes(40, seed=seed, vocab_size=50, longest_output=60, stop=49)
        recording = record(model, TIGHT, requests, cancel_every=11)
        live = player(model, recording, TIGHT)
        for request, result in zip(recording.requests, recording.results, strict=True):
            assert live.replay(request, "faithful", result).document() == result.document()


@pytest.fixture(scope="module")
def toy() -> tuple[ToyModel, Recording]:
    """A recording on the toy whose prompts share prefixes."""
    model = ToyModel(ToyExecutor())
    return model, record(model, TIGHT, requests_with_shared_prefixes(30, seed=2, vocab_size=40, longest_output=50))


def test_no_other_request_s_token_is_fed() -> None:
    """The canary tokens of one tenant never reach the executor while the other's requests replay."""
    model = ToyModel(ToyExecutor())
    plain = requests_with_shared_prefixes(30, seed=4, vocab_size=40)
    requests = [
        request
        if number % 2
        else msgspec.structs.replace(request, prompt=(*(45 if token == 0 else token for token in request.prompt), 46))
        for number, request in enumerate(plain)
    ]
    recording = record(model, TIGHT, requests)
    spy = Spy(ToyExecutor())
    live = player(ToyModel(spy), recording, TIGHT)
    for request, result in list(zip(recording.requests, recording.results, strict=True))[1::2]:
        if {45, 46} & set(result.tokens):
            continue
        assert live.replay(request, "faithful", result).document() == result.document()
    assert spy.fed
    assert not {45, 46} & spy.fed


def test_forced_replay_shows_choices_without_drifting(toy: tuple[ToyModel, Recording]) -> None:
    """On a changed model the fed tokens stay the recorded ones and the records say what would have been chosen."""
    model, recording = toy
    changed = ToyExecutor()
    changed.head = changed.head[:, ::-1].copy()
    for request, result in zip(recording.requests[:8], recording.results, strict=False):
        same = player(model, recording, TIGHT).replay(request, "forced", result)
        assert same.document() == result.document()
        other = player(ToyModel(changed), recording, TIGHT).replay(request, "forced", result)
        assert other.tokens == result.tokens
        assert [one.position for one in other.records] == [one.position for one in result.records]
        assert other.records[0].logits_digest != result.records[0].logits_digest


def test_a_replay_that_leaves_the_recording_goes_on_with_its_own_tokens(toy: tuple[ToyModel, Recording]) -> None:
    """Another model's tokens follow the recorded rows, stop early at a stop token, and go on alone past the end."""
    _, recording = toy
    changed = ToyExecutor()
    changed.head = changed.head[:, ::-1].copy()
    live = player(ToyModel(changed), recording, TIGHT)
    past = early = 0
    for request, result in zip(recording.requests, recording.results, strict=True):
        longer = msgspec.structs.replace(
            request, sampling=msgspec.structs.replace(request.sampling, max_tokens=request.sampling.max_tokens + 5)
        )
        playback = live.play(longer, "faithful", result)
        past += playback.slice.past_calls > 0
        early += len(playback.result.tokens) < len(result.tokens)
        assert playback.result.finish_reason in ("stop", "length")
        assert playback.result.tokens != result.tokens
    assert past
    assert early


def test_a_lost_step_is_named_only_by_those_who_need_it(toy: tuple[ToyModel, Recording]) -> None:
    """Replay refuses a slice with a hole and still replays the others exactly."""
    model, recording = toy
    lost = recording.results[0].steps[len(recording.results[0].steps) // 2]
    holed = PlanPlayer(
        model.executor,
        model.tokenizer,
        TIGHT,
        [plan for plan in recording.plans if plan.step != lost],
        recording.sequences,
    )
    refused = 0
    for request, result in zip(recording.requests, recording.results, strict=True):
        try:
            assert holed.replay(request, "faithful", result).document() == result.document()
        except PlanMissing:
            refused += 1
            assert holed.replay(request, "alone").tokens
    assert 0 < refused < 30
    unknown = msgspec.structs.replace(recording.requests[0], sequence_id="unknown")
    with pytest.raises(PlanMissing):
        holed.replay(unknown, "faithful", recording.results[0])
    playback = holed.play(unknown)  # nothing was ever recorded of it: one more turn of a counterfactual
    assert playback.slice.steps == ()
    assert playback.result.document() == holed.replay(unknown, "alone").document()


def test_a_conversation_reads_blocks_that_earlier_turns_decoded(checkpoint: Path) -> None:
    """Each turn's prompt holds the last turn's output: lineage goes through its decode steps, turn by turn."""
    model, recorder = eager(checkpoint, "float32-fused"), ListRecorder()
    draw = random.Random(3)
    prompts = [tuple(draw.randrange(256) for _ in range(40)) for _ in range(3)]
    with Engine(model, SCHEDULING, recorder) as engine:
        for turn in range(3):
            requests = [
                GenerationRequest(f"{talk}.{turn}", "tenant", prompt, Sampling(max_tokens=20, stop_token_ids=(STOP,)))
                for talk, prompt in enumerate(prompts)
            ]
            results = [handle.wait(60) for handle in [engine.submit(request) for request in requests]]
            prompts = [(*one.prompt, *two.tokens, turn, 7) for one, two in zip(requests, results, strict=True)]
    live = PlanPlayer(model.executor, model.tokenizer, SCHEDULING, plans_of(recorder), sequences_of(recorder))
    for talk in range(3):
        request, result = stored_pair(recorder, f"{talk}.2")
        playback = live.play(request, "faithful", result)
        assert playback.result.document() == result.document()
        assert result.cached_tokens >= 64
        assert playback.slice.prefix_calls > 20


def test_another_prompt_has_no_recorded_rows(toy: tuple[ToyModel, Recording]) -> None:
    """Refused along the plan, possible alone."""
    model, recording = toy
    longer = msgspec.structs.replace(recording.requests[3], prompt=(*recording.requests[3].prompt, 1))
    with pytest.raises(PlanMissing):
        player(model, recording, TIGHT).replay(longer, "faithful", recording.results[3])
    assert player(model, recording, TIGHT).replay(longer, "alone").tokens


def test_a_failed_sequence_replays_up_to_its_failure() -> None:
    """The rows before the failing call are repeated exactly; the call that failed is not run."""
    requests = requests_with_shared_prefixes(6, seed=5, vocab_size=40)
    free = record(ToyModel(ToyExecutor()), TIGHT, requests)
    fatal = next(token for result in free.results for token in result.tokens[2:-1])
    executor, recorder = ToyExecutor(fail_on=fatal), ListRecorder()
    with Engine(ToyModel(executor), TIGHT, recorder) as engine:
        for handle in [engine.submit(request) for request in requests]:
            with contextlib.suppress(EngineFailed):
                handle.wait(30)
    live = PlanPlayer(ToyExecutor(), None, TIGHT, plans_of(recorder), sequences_of(recorder))
    failed = 0
    for request in requests:
        stored, result = stored_pair(recorder, request.sequence_id)
        failed += result.finish_reason == "error"
        assert live.replay(stored, "faithful", result).document() == result.document()
    assert failed


def test_plans_in_any_order_and_requests_from_evidence(toy: tuple[ToyModel, Recording]) -> None:
    """What the ledger holds is enough: shuffled plans and the stored request and result."""
    model, recording = toy
    shuffled = list(recording.plans)
    random.Random(1).shuffle(shuffled)
    live = PlanPlayer(model.executor, None, TIGHT, shuffled, recording.sequences)
    for number in (0, 7, 19):
        request, result = stored_pair(recording.recorder, f"sequence-{number}")
        assert live.replay(request, "faithful", result).document() == result.document()


def test_a_recorded_engine_answers_like_a_live_one(toy: tuple[ToyModel, Recording]) -> None:
    """Behind the same protocol, streaming included, also when asked for many at once."""
    model, recording = toy
    results = {result.sequence_id: result for result in recording.results}
    service = RecordedGeneration(player(model, recording, TIGHT), results)
    seen: list[TokenRecord] = []

    async def scenario() -> None:
        answers = await asyncio.gather(
            *(
                service.generate(request, seen.append if not number else None)
                for number, request in enumerate(recording.requests[:4])
            )
        )
        assert [one.document() for one in answers] == [one.document() for one in recording.results[:4]]

    asyncio.run(scenario())
    assert tuple(record.token for record in seen) == recording.results[0].tokens
