"""Every finished request replays from its slice under every policy, at the cost of its slice and not of the run."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.scheduling import SchedulingManifest
from runtime.engine.ensemble import Ensemble
from runtime.engine.generation import GenerationRequest, Sampling
from runtime.engine.playback import PlanPlayer
from tests.runtime.engine.recorded import Recording, requests_with_shared_prefixes
from tests.runtime.engine.stepped import record_steps
from tests.runtime.engine.toy import ToyExecutor, ToyModel

CALM = {"tenant": 0, "priority": 0, "deadline": None, "temperature": 0.0}
POLICIES = ("fcfs", "priority", "deadline", "fair")
COMMON = tuple(place * 7 % 250 + 1 for place in range(64))

wishes = st.fixed_dictionaries(
    {
        "tick": st.integers(0, 24),
        "shared": st.integers(0, 60),
        "own": st.integers(1, 24),
        "tokens": st.integers(1, 20),
        "tenant": st.integers(0, 2),
        "priority": st.integers(0, 3),
        "deadline": st.none() | st.integers(1_000, 40_000),
        "leaves": st.none() | st.none() | st.integers(0, 20),
        "temperature": st.sampled_from([0.0, 0.9]),
    }
)
rules = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(POLICIES),
        "max_num_seqs": st.sampled_from([3, 8]),
        "max_num_batched_tokens": st.sampled_from([16, 40, 128]),
        "long_prefill_token_threshold": st.sampled_from([0, 24]),
        "num_blocks": st.integers(8, 16),
        "watermark": st.sampled_from(["0", "0.1"]),
        "enable_prefix_caching": st.booleans(),
        "max_preemptions": st.none() | st.integers(0, 2),
        "prefix_sharing": st.sampled_from(["tenant", "all"]),
    }
)


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    """A tiny random decoder on eager float32, whose bits depend on every padded size."""
    from runtime.backends.eager import EagerExecutor
    from runtime.models.random_checkpoint import random_checkpoint

    checkpoint = random_checkpoint(
        tmp_path_factory.mktemp("slices") / "model", vocab_size=320, hidden_size=32, intermediate_size=64,
        num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, max_positions=256,
    )  # fmt: skip
    return ToyModel(EagerExecutor.from_checkpoint(checkpoint, precision="float32"))


def wished(number: int, wish: dict[str, Any]) -> GenerationRequest:
    """Turn a wish into a request."""
    own = tuple((number * 31 + place * 13) % 250 + 1 for place in range(wish["own"]))
    return GenerationRequest(
        sequence_id=f"sequence-{number}",
        tenant=f"tenant-{wish['tenant']}",
        prompt=COMMON[: wish["shared"]] + own,
        sampling=Sampling(seed=number, temperature=wish["temperature"], max_tokens=wish["tokens"]),
        deadline_us=wish["deadline"],
        priority=wish["priority"],
    )


def replay_all(model: Any, scheduling: SchedulingManifest, recording: Recording) -> Counter[str]:
    """Replay every request of a recording; return what the recording held."""
    player = PlanPlayer(model.executor, model.tokenizer, scheduling, recording.plans, recording.sequences)
    held: Counter[str] = Counter()
    for request, result in zip(recording.requests, recording.results, strict=True):
        playback = player.play(request, "faithful", result)
        assert playback.result.document() == result.document()
        assert playback.result.steps == result.steps
        assert playback.slice.past_calls == 0
        held[result.finish_reason] += 1
        held["preemptions"] += result.preemptions
        held["hits"] += result.cached_tokens > 0
        held["prefix_calls"] += playback.slice.prefix_calls
    return held


def record_and_replay(model: Any, rule: dict[str, Any], wanted: list[dict[str, Any]]) -> None:
    """Record what is wished under the rules, and replay it all."""
    scheduling = SchedulingManifest(**rule)
    requests = [wished(number, wish) for number, wish in enumerate(wanted)]
    ticks = [wish["tick"] for wish in wanted]
    leaves = {number: wish["tick"] + wish["leaves"] for number, wish in enumerate(wanted) if wish["leaves"] is not None}
    replay_all(model, scheduling, record_steps(model, scheduling, requests, ticks, leaves=leaves))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(rule=rules, wanted=st.lists(wishes, min_size=2, max_size=14))
def test_many_more_of_them_replay(eager: ToyModel, rule: dict[str, Any], wanted: list[dict[str, Any]]) -> None:
    """The same, long."""
    record_and_replay(eager, rule, wanted)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(rule=rules, wanted=st.lists(wishes, min_size=2, max_size=10))
def test_every_finished_request_replays_from_its_slice(
    eager: ToyModel, rule: dict[str, Any], wanted: list[dict[str, Any]]
) -> None:
    """Random arrivals, lengths, tenants, priorities, cancellations and small pools, on a real model, to the bit."""
    record_and_replay(eager, rule, wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_hard_cases_are_in_the_slices_of_every_policy(eager: ToyModel, policy: str) -> None:
    """Preemptions, prefix hits, evicted blocks and cancellations all occur, and all finished requests replay."""
    draw = random.Random(9)
    wanted = [
        {
            "tick": draw.randrange(60), "shared": draw.choice([0, 33, 50]), "own": draw.randrange(1, 24),
            "tokens": draw.randrange(4, 24), "tenant": draw.randrange(2), "priority": draw.randrange(3),
            "deadline": draw.choice([None, 20_000]), "temperature": draw.choice([0.0, 0.9]),
        }
        for _ in range(24)
    ]  # fmt: skip
    scheduling = SchedulingManifest(policy=policy, max_num_seqs=8, max_num_batched_tokens=40, num_blocks=12)
    requests = [wished(number, wish) for number, wish in enumerate(wanted)]
    leaves = {3: wanted[3]["tick"] + 5, 11: wanted[11]["tick"] + 9}
    recording = record_steps(eager, scheduling, requests, [wish["tick"] for wish in wanted], leaves=leaves)
    held = replay_all(eager, scheduling, recording)
    assert held["preemptions"] > 2
    assert held["hits"] > 2
    assert held["cancelled"] >= 1
    assert held["prefix_calls"] > 0
    blocks = [block for plan in recording.plans for _, *given_out in plan.allocations for block in given_out]
    assert len(blocks) > scheduling.num_blocks  # blocks were given out again: what they held was evicted or freed


def test_lineage_through_evicted_blocks_may_need_more_blocks_than_the_engine_had(eager: ToyModel) -> None:
    """Computing again what was evicted meanwhile takes blocks beside those that are held: the replay's pool grows."""
    shapes = [
        (0, 0, 1, 1),
        (0, 0, 1, 1),
        (0, 0, 1, 1),
        (0, 0, 1, 1),
        (0, 0, 1, 1),
        (0, 0, 1, 1),
        (0, 0, 1, 1),
        (0, 0, 1, 1),
        (0, 0, 1, 17),
        (0, 16, 14, 20),
        (0, 44, 24, 15),
    ]
    wanted = [dict(zip(("tick", "shared", "own", "tokens"), shape, strict=True)) | CALM for shape in shapes]
    requests = [wished(number, wish) for number, wish in enumerate(wanted)]
    scheduling = SchedulingManifest(max_num_seqs=3, max_num_batched_tokens=16, num_blocks=8, watermark="0")
    recording = record_steps(eager, scheduling, requests, [wish["tick"] for wish in wanted])
    held = replay_all(eager, scheduling, recording)
    assert held["prefix_calls"] > 0


def test_a_replay_costs_its_slice_however_long_the_run_was() -> None:
    """The same request, with four hundred others after it instead of forty: the same calls, a fraction of the run's."""
    scheduling = SchedulingManifest(max_num_seqs=8, max_num_batched_tokens=64, num_blocks=64)
    requests = requests_with_shared_prefixes(400, seed=8, vocab_size=50, longest_output=30, stop=49)
    ticks = [number // 2 for number in range(400)]
    costs: list[tuple[int, int]] = []
    for length in (40, 400):
        model = ToyModel(ToyExecutor())
        recording = record_steps(model, scheduling, requests[:length], ticks[:length])
        live = PlanPlayer(model.executor, None, scheduling, recording.plans, recording.sequences)
        model.executor.calls = 0
        playback = live.play(requests[20], "faithful", recording.results[20])
        used = playback.slice
        assert model.executor.calls == used.own_calls + used.prefix_calls
        assert used.own_calls == len(recording.results[20].steps)
        costs.append((model.executor.calls, used.recorded_calls))
    assert costs[0][0] == costs[1][0]
    assert costs[1][1] > 5 * costs[0][1]
    assert costs[1][0] < costs[1][1] / 10


@pytest.mark.parametrize("policy", POLICIES)
def test_a_whole_run_replays_together_as_it_replays_from_slices(eager: ToyModel, policy: str) -> None:
    """All rows of a recorded call at once: the same results, in as many calls as the run had."""
    scheduling = SchedulingManifest(policy=policy, max_num_seqs=8, max_num_batched_tokens=40, num_blocks=12)
    draw = random.Random(5)
    requests = requests_with_shared_prefixes(20, seed=5, vocab_size=250, longest_output=24, stop=249)
    ticks = [draw.randrange(30) for _ in requests]
    recording = record_steps(eager, scheduling, requests, ticks, leaves={4: ticks[4] + 6})
    members = dict(enumerate(zip(recording.requests, recording.results, strict=True)))
    ensemble = Ensemble(eager.executor, None, scheduling, members)
    together = ensemble.play(recording.plans)
    player = PlanPlayer(eager.executor, None, scheduling, recording.plans, recording.sequences)
    alone_calls = 0
    for index, (request, result) in members.items():
        playback = player.play(request, "faithful", result)
        alone_calls += playback.slice.own_calls + playback.slice.prefix_calls
        assert together[index].document() == playback.result.document() == result.document()
        assert together[index].steps == result.steps
        assert together[index].cached_tokens == result.cached_tokens
        assert together[index].preemptions == result.preemptions
    assert ensemble.calls == sum(len(plan.calls) for plan in recording.plans)
    assert ensemble.calls * 2 < alone_calls


def test_one_that_leaves_the_recording_takes_no_other_with_it(eager: ToyModel) -> None:
    """Other draws for one member: its tokens differ, it ends early or late, and all others stay as they were."""
    scheduling = SchedulingManifest(max_num_seqs=8, max_num_batched_tokens=64, num_blocks=40)
    requests = requests_with_shared_prefixes(10, seed=6, vocab_size=250, longest_output=20)
    recording = record_steps(eager, scheduling, requests, [0] * 10)
    members = dict(enumerate(zip(recording.requests, recording.results, strict=True)))
    for limit in (2, 60):
        sampling = msgspec.structs.replace(requests[3].sampling, temperature=2.0, seed=99, max_tokens=limit)
        changed = members | {3: (msgspec.structs.replace(requests[3], sampling=sampling), recording.results[3])}
        together = Ensemble(eager.executor, None, scheduling, changed).play(recording.plans)
        assert (3 in together) == (limit == 2)  # past the recorded rows it has no result: its slice goes on alone
        for index, (_, result) in members.items():
            if index != 3:
                assert together[index].document() == result.document()
