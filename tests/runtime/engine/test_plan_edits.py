"""Edited plans: as recorded before the first edit, an idle engine's after the last, one edit from each to the next."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.scheduling import SchedulingManifest
from runtime.engine.edited_replays import EditedReplays
from runtime.engine.plan_edits import edit_path
from tests.runtime.engine.recorded import Recording, requests_with_shared_prefixes
from tests.runtime.engine.stepped import record_steps
from tests.runtime.engine.toy import ToyExecutor, ToyModel

TIGHT = SchedulingManifest(max_num_seqs=8, max_num_batched_tokens=40, num_blocks=22, long_prefill_token_threshold=24)
ROOMY = SchedulingManifest(max_num_seqs=8, max_num_batched_tokens=64, num_blocks=200, batch_sizes=(1, 2, 4, 8))
MODEL = ToyModel(ToyExecutor())


def recording_of(seed: int, scheduling: SchedulingManifest, *, count: int = 12, spread: int = 3) -> Recording:
    """A small busy engine on the toy, with arrivals at random steps and one cancellation."""
    draw = random.Random(seed)
    requests = requests_with_shared_prefixes(count, seed=seed, vocab_size=50, longest_output=40, stop=49)
    ticks = [draw.randrange(count * spread) for _ in requests]
    return record_steps(MODEL, scheduling, requests, ticks, leaves={2: ticks[2] + 6})


def replays_of(recording: Recording, number: int, scheduling: SchedulingManifest, model: Any = MODEL) -> EditedReplays:
    """Edited replays of one request of a recording."""
    return EditedReplays(
        model.executor, model.tokenizer, scheduling, recording.plans, recording.sequences, recording.requests[number]
    )


def bits(records: Any) -> list[tuple[int, str]]:
    """Tokens and digests."""
    return [(record.token, record.logits_digest) for record in records]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), tight=st.booleans())
def test_a_path_leads_from_the_recorded_plan_to_an_idle_engine_s(seed: int, tight: bool) -> None:
    """Through prefix hits, chunks, preemptions and cancellations: the ends of the path are what they are called."""
    scheduling = TIGHT if tight else ROOMY
    recording = recording_of(seed, scheduling)
    for number, result in enumerate(recording.results):
        wanted = len(result.tokens)
        if not wanted:
            continue
        replays = replays_of(recording, number, scheduling)
        plan = replays.recorded_plan(wanted)
        assert bits(replays.again(plan, wanted)) == bits(result.records)
        path = list(edit_path(plan))
        assert bits(replays.again(plan, wanted)) == bits(replays.alone(wanted))
        assert all(plan.shape(seat).rows == 1 for seat in plan.seats)
        assert all(change.edit.step in result.steps for change in path)
        assert list(edit_path(plan)) == []  # an idle engine's plan needs no edit


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000))
def test_what_does_not_reach_the_shapes_does_not_reach_the_bits(seed: int) -> None:
    """Along a path the signature changes exactly where a change says so, and equal signatures give equal bits."""
    recording = recording_of(seed, TIGHT)
    number = seed % len(recording.requests)
    wanted = len(recording.results[number].tokens)
    if not wanted:
        return
    replays = replays_of(recording, number, TIGHT)
    before, known = replays.recorded_plan(wanted), {}
    signature = before.signature()
    for change in edit_path(replays.recorded_plan(wanted)):
        before.apply(change.edit)
        assert (before.signature() != signature) == change.reaches_bits
        signature = before.signature()
        found = bits(replays.again(before, wanted))
        assert known.setdefault(signature, found) == found
