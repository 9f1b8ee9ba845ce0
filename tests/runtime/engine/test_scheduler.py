"""The scheduler is pure, keeps its budgets, shares only equal prefixes of one tenant, and ends everything once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manifests.scheduling import SchedulingManifest
from runtime.engine.errors import SequenceRefused
from runtime.engine.plan import StepPlan
from runtime.engine.scheduler import SchedulerState, complete_step, new_state, plan_step, submit, withdraw
from runtime.engine.settings import Settings
from traces.failures import FailureClass

BLOCK = 4


def settings_of(**changes: object) -> Settings:
    """Small settings with blocks of four tokens."""
    fields: dict[str, object] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 12,
        "block_size": BLOCK,
        "num_blocks": 12,
        "context_multiple": 8,
        "batch_sizes": (1, 2, 4),
    }
    manifest = SchedulingManifest.model_validate(fields | changes)
    return Settings.of(manifest, max_positions=64, max_batch=8, max_tokens=16, max_context=64)


class Engine(RuleBasedStateMachine):
    """Drives the scheduler as the loop does, with a shadow of what every block holds."""

    @initialize(
        blocks=st.integers(6, 14),
        budget=st.integers(4, 20),
        threshold=st.sampled_from([0, 3, 8]),
        watermark=st.sampled_from(["0", "0.1"]),
        caching=st.booleans(),
    )
    def begin(self, blocks: int, budget: int, threshold: int, watermark: str, caching: bool) -> None:
        """Start an engine."""
        self.settings = settings_of(
            num_blocks=blocks,
            max_num_batched_tokens=budget,
            long_prefill_token_threshold=threshold,
            watermark=watermark,
            enable_prefix_caching=caching,
        )
        self.state: SchedulerState = new_state(self.settings)
        self.tokens: dict[int, list[int]] = {}
        self.limit: dict[int, int] = {}
        self.tenant: dict[int, str] = {}
        self.tables: dict[int, list[int]] = {}
        self.content: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.ended: Counter[int] = Counter()
        self.reported: Counter[int] = Counter()

    @rule(common=st.integers(0, 12), own=st.integers(1, 8), more=st.integers(1, 12), tenant=st.sampled_from("ab"))
    def arrive(self, common: int, own: int, more: int, tenant: str) -> None:
        """A request arrives; one that could never fit is refused and leaves no trace."""
        index = len(self.tokens)
        prompt = tuple([1] * common + [2 + index % 3] * own)
        if len(prompt) + more > self.settings.longest_sequence:
            with pytest.raises(SequenceRefused):
                submit(self.state, index, prompt=prompt, max_tokens=more, tenant=tenant)
            assert index not in self.state.waiting
            return
        submit(self.state, index, prompt=prompt, max_tokens=more, tenant=tenant)
        self.tokens[index] = list(prompt)
        self.limit[index] = len(prompt) + more
        self.tenant[index] = tenant

    @rule(pick=st.integers(0, 100))
    def cancel(self, pick: int) -> None:
        """A request is cancelled: its blocks are free at once."""
        alive = [index for index in self.tokens if not self.ended[index]]
        if alive:
            index = alive[pick % len(alive)]
            assert withdraw(self.state, index, reason="cancelled")
            assert not withdraw(self.state, index, reason="cancelled")
            self.ended[index] += 1
            self.tables.pop(index, None)

    @precondition(lambda self: self.state.has_work)
    @rule()
    def step(self) -> None:
        """One step: planned twice from equal states, checked against the shadow, completed."""
        twin = self.state.copy()
        plan, self.state = plan_step(self.state)
        again, twin = plan_step(twin)
        assert plan == again
        assert (twin.step, twin.waiting, twin.running) == (self.state.step, self.state.waiting, self.state.running)
        assert vars(twin.cache) == vars(self.state.cache)
        self.check_shapes(plan)
        self.follow(plan)
        sampled = {
            row.sequence: (len(self.tokens[row.sequence]) % 5) for call in plan.calls for row in call.rows if row.sample
        }
        complete_step(self.state, plan, sampled)
        for index, token in sampled.items():
            self.tokens[index].append(token)
            if len(self.tokens[index]) == self.limit[index]:
                withdraw(self.state, index, reason="length")
                self.ended[index] += 1
                self.tables.pop(index)

    def check_shapes(self, plan: StepPlan) -> None:
        """Budgets, padding, one row a sequence."""
        rows = [row for call in plan.calls for row in call.rows]
        assert plan.token_count == sum(row.count for row in rows) <= self.settings.max_num_batched_tokens
        assert len({row.sequence for row in rows}) == len(rows) <= self.settings.max_num_seqs
        for call in plan.calls:
            assert call.batch in self.settings.batch_sizes
            assert len(call.rows) <= call.batch
            assert call.tokens == 1 or call.tokens % BLOCK == 0
            assert call.context % self.settings.context_multiple == 0
            for row in call.rows:
                assert 1 <= row.count <= min(call.tokens, self.settings.longest_chunk)
                assert row.start <= call.context
                assert row.sample == (row.start + row.count == len(self.tokens[row.sequence]))
        assert not (plan.preemptions and plan.admissions)

    def follow(self, plan: StepPlan) -> None:
        """Apply the plan to the shadow tables; what a row reads must be its own tokens under its own tenant."""
        for release in plan.releases:
            self.reported[release.sequence] += 1
        for preemption in plan.preemptions:
            del self.tables[preemption.sequence]
        for admission in plan.admissions:
            self.tables[admission.sequence] = [hit.block for hit in admission.hits]
            assert admission.known == len(self.tokens[admission.sequence])
        for index, *blocks in plan.allocations:
            taken = {block for table in self.tables.values() for block in table}
            assert not taken & set(blocks), "a held block was given out"
            self.tables[index].extend(blocks)
        for call in plan.calls:
            for row in call.rows:
                table, tokens = self.tables[row.sequence], self.tokens[row.sequence]
                tenant = self.tenant[row.sequence]
                for position in range(row.start):
                    held = self.content[table[position // BLOCK], position % BLOCK]
                    assert held == (tenant, tuple(tokens[: position + 1])), "a row reads what is not its own prefix"
                for position in range(row.start, row.start + row.count):
                    place = (table[position // BLOCK], position % BLOCK)
                    self.content[place] = (tenant, tuple(tokens[: position + 1]))

    @invariant()
    def accounts_agree(self) -> None:
        """No block is leaked or held twice by mistake."""
        if hasattr(self, "state"):
            assert self.state.cache.problems([one.blocks for one in self.state.running]) == []
            assert {one.index: one.blocks for one in self.state.running} == self.tables

    def teardown(self) -> None:
        """Let everything finish: each sequence ends and is reported once, and all blocks come back."""
        if hasattr(self, "state"):
            for _ in range(3000):
                if not self.state.has_work:
                    break
                self.step()
            assert not self.state.has_work
            assert all(self.ended[index] == 1 for index in self.tokens)
            assert self.reported == Counter(self.tokens.keys())
            assert self.state.cache.available == self.settings.num_blocks


Engine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestEngine = Engine.TestCase


def run(state: SchedulerState, steps: int = 1) -> list[StepPlan]:
    """Run some steps, sampling token 3 everywhere."""
    plans: list[StepPlan] = []
    for _ in range(steps):
        plan, state = plan_step(state)
        complete_step(state, plan, {row.sequence: 3 for call in plan.calls for row in call.rows if row.sample})
        plans.append(plan)
    return plans


def test_decodes_come_first_and_chunks_fill_the_budget() -> None:
    """A running decode keeps its place while a long prompt is read in chunks."""
    state = new_state(settings_of())
    submit(state, 0, prompt=(1, 2), max_tokens=20, tenant="a")
    run(state)
    submit(state, 1, prompt=tuple(range(20)), max_tokens=2, tenant="a")
    first, second = run(state, 2)
    assert [(call.graph, [(row.sequence, row.start, row.count) for row in call.rows]) for call in first.calls] == [
        ("decode", [(0, 2, 1)]),
        ("prefill", [(1, 0, 11)]),
    ]
    assert [row.start for row in second.calls[1].rows] == [11]
    assert first.calls[1].silent == [0]


def test_a_shared_prefix_is_hit_only_inside_one_tenant() -> None:
    """The second request of a tenant reads the first one's blocks, with their origin; another tenant computes."""
    state = new_state(settings_of(max_num_batched_tokens=16))
    submit(state, 0, prompt=(1,) * 9, max_tokens=4, tenant="a")
    run(state)
    submit(state, 1, prompt=(1,) * 9, max_tokens=4, tenant="a")
    submit(state, 2, prompt=(1,) * 9, max_tokens=4, tenant="b")
    submit(state, 3, prompt=(1,) * 9, max_tokens=4, tenant="a")
    (plan,) = run(state)
    hits = {
        admission.sequence: [(hit.step, hit.call, hit.row) for hit in admission.hits] for admission in plan.admissions
    }
    assert hits == {1: [(0, 0, 0)] * 2, 2: [], 3: [(0, 0, 0)] * 2}


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    """When blocks run out the newest sequence yields, keeps its tokens, and is recomputed before later arrivals."""
    state = new_state(settings_of(num_blocks=4, enable_prefix_caching=False))
    for index in range(2):
        submit(state, index, prompt=(1,) * 7, max_tokens=9, tenant="a")
    submit(state, 2, prompt=(1, 2), max_tokens=2, tenant="a")
    plans = run(state, 12)
    preempted = [(plan.step, one.sequence) for plan in plans for one in plan.preemptions]
    assert preempted[0][1] == 1
    order = [one.sequence for plan in plans for one in plan.admissions]
    assert order[:2] == [0, 1]


def test_what_can_never_fit_is_refused_as_capacity() -> None:
    """A request longer than the cache is refused alone, with what it needed."""
    state = new_state(settings_of(num_blocks=2))
    with pytest.raises(SequenceRefused) as caught:
        submit(state, 0, prompt=(1,) * 7, max_tokens=2, tenant="a")
    assert caught.value.failure_class is FailureClass.CAPACITY_ADMISSION
    assert caught.value.complete_evidence()["reservation_failure"] == {"tokens_needed": 9, "tokens_possible": 8}
    assert not state.has_work


@pytest.mark.parametrize(
    "changes",
    [{"policy": "fair"}, {"context_multiple": 6}, {"batch_sizes": (1, 2)}, {"max_num_batched_tokens": 3}],
)
def test_contradicting_pins_are_refused(changes: dict[str, object]) -> None:
    """Settings that no engine could honour are refused before it starts."""
    with pytest.raises(SequenceRefused):
        settings_of(**changes)


def test_a_watermark_holds_back_admission_but_never_the_only_sequence() -> None:
    """With half the blocks reserved, one sequence may still use all of them."""
    state = new_state(settings_of(num_blocks=4, watermark="0.5"))
    submit(state, 0, prompt=(1,) * 9, max_tokens=4, tenant="a")
    submit(state, 1, prompt=(2,) * 3, max_tokens=4, tenant="a")
    (plan,) = run(state)
    assert [one.sequence for one in plan.admissions] == [0]
