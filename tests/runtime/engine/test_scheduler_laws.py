"""Under every policy: pure, within budget, no block leaked or shared by mistake, everything ends once, nothing starves.

A state machine drives the scheduler as the loop does, with a shadow of what every block holds, who waits and who ended.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.engine.errors import SequenceRefused
from runtime.engine.plan import StepPlan
from runtime.engine.policies import FairQueue, service_gap
from runtime.engine.scheduler import (
    SchedulerState,
    complete_step,
    hold,
    new_state,
    plan_step,
    resume,
    submit,
    withdraw,
)
from tests.runtime.engine.stepping import BLOCK, settings_of

STEP_US = 10


class Engine(RuleBasedStateMachine):
    """A scheduler under one policy, with its shadow."""

    @initialize(
        policy=st.sampled_from(["fcfs", "priority", "deadline", "fair"]),
        blocks=st.integers(6, 14),
        budget=st.integers(4, 20),
        threshold=st.sampled_from([0, 3, 8]),
        watermark=st.sampled_from(["0", "0.1"]),
        caching=st.booleans(),
        sharing=st.sampled_from(["tenant", "all"]),
        limit=st.sampled_from([None, 0, 1, 2]),
        queued=st.sampled_from([None, 3]),
        shedding=st.booleans(),
    )
    def begin(self, **pins: object) -> None:
        """Start an engine."""
        self.settings = settings_of(
            policy=pins["policy"],
            num_blocks=pins["blocks"],
            max_num_batched_tokens=pins["budget"],
            long_prefill_token_threshold=pins["threshold"],
            watermark=pins["watermark"],
            enable_prefix_caching=pins["caching"],
            prefix_sharing=pins["sharing"],
            max_preemptions=pins["limit"],
            max_num_queued_reqs=pins["queued"],
            load_shedding=pins["shedding"],
            aging_steps=5,
            aging_us=20 * STEP_US,
        )
        self.state: SchedulerState = new_state(self.settings)
        self.now_us = 0
        self.tokens: dict[int, list[int]] = {}
        self.limit: dict[int, int] = {}
        self.owner: dict[int, str] = {}
        self.place: dict[int, tuple[int, int]] = {}
        self.priority: dict[int, int] = {}
        self.deadline: dict[int, int | None] = {}
        self.tables: dict[int, list[int]] = {}
        self.content: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.held: set[int] = set()
        self.evicted: Counter[int] = Counter()
        self.ended: Counter[int] = Counter()
        self.reported: Counter[int] = Counter()

    @rule(
        common=st.integers(0, 12),
        own=st.integers(1, 8),
        more=st.integers(1, 12),
        tenant=st.sampled_from("abc"),
        priority=st.integers(0, 3),
        due=st.none() | st.integers(1, 40),
    )
    def arrive(self, common: int, own: int, more: int, tenant: str, priority: int, due: int | None) -> None:
        """A request arrives; one that could never fit, or meets a full queue, is refused and leaves no trace."""
        index, waiting = len(self.tokens), len(self.state.waiting)
        prompt = tuple([1] * common + [2 + index % 3] * own)
        deadline_us = None if due is None else self.now_us + due * STEP_US
        full = self.full()
        arguments = {"tenant": tenant, "priority": priority, "deadline_us": deadline_us, "now_us": self.now_us}
        if len(prompt) + more > self.settings.longest_sequence or full:
            with pytest.raises(SequenceRefused):
                submit(self.state, index, prompt=prompt, max_tokens=more, **arguments)  # type: ignore[arg-type]
            assert index not in self.state.waiting and len(self.state.waiting) == waiting
            return
        rank = {
            "priority": 5 * priority + self.state.step,
            "deadline": min(self.now_us + 20 * STEP_US, deadline_us or 10**9),
        }
        self.place[index] = (rank.get(self.settings.policy, 0), index)
        submit(self.state, index, prompt=prompt, max_tokens=more, **arguments)  # type: ignore[arg-type]
        self.tokens[index] = list(prompt)
        self.limit[index] = len(prompt) + more
        self.owner[index] = "all" if self.settings.share_prefixes else tenant
        self.priority[index] = priority
        self.deadline[index] = deadline_us

    def full(self) -> bool:
        """Whether as many wait as may, beside those that find a place and, at their mean length, blocks."""
        most, queue = self.settings.max_num_queued_reqs, self.waiting()
        if most is None or len(queue) < most:
            return False
        held = {block for table in self.tables.values() for block in table}
        blocks = self.settings.num_blocks - len(held) - self.settings.watermark_blocks
        mean = Fraction(sum(len(self.tokens[index]) for index in queue), len(queue))
        places = min(self.settings.max_num_seqs - len(self.tables), max(0, blocks) * BLOCK // mean)
        return len(queue) - places >= most

    @rule(pick=st.integers(0, 100))
    def cancel(self, pick: int) -> None:
        """A request is cancelled, wherever it is: its blocks are free at once."""
        if alive := [index for index in self.tokens if not self.ended[index]]:
            index = alive[pick % len(alive)]
            assert withdraw(self.state, index, reason="cancelled")
            assert not withdraw(self.state, index, reason="cancelled")
            self.end(index)

    @rule(pick=st.integers(0, 100))
    def fall_behind(self, pick: int) -> None:
        """The reader of a running sequence falls behind."""
        if self.tables:
            index = sorted(self.tables)[pick % len(self.tables)]
            assert hold(self.state, index)
            self.held.add(index)

    @rule(pick=st.integers(0, 100))
    def catch_up(self, pick: int) -> None:
        """A reader catches up."""
        if self.held:
            index = sorted(self.held)[pick % len(self.held)]
            assert resume(self.state, index)
            assert not resume(self.state, index)
            self.held.remove(index)

    @precondition(lambda self: self.state.has_work)
    @rule()
    def step(self) -> None:
        """One step: planned twice from equal states, checked against the shadow, completed."""
        twin, waiting = self.state.copy(), self.waiting()
        self.now_us += STEP_US
        plan, self.state = plan_step(self.state, now_us=self.now_us, step_us=STEP_US)
        again, twin = plan_step(twin, now_us=self.now_us, step_us=STEP_US)
        assert plan == again
        assert (twin.step, twin.waiting, twin.running) == (self.state.step, self.state.waiting, self.state.running)
        assert vars(twin.cache) == vars(self.state.cache)
        self.check_shapes(plan)
        self.check_order(plan, waiting)
        self.follow(plan)
        sampled = {
            row.sequence: (len(self.tokens[row.sequence]) % 5) for call in plan.calls for row in call.rows if row.sample
        }
        complete_step(self.state, plan, sampled)
        for index, token in sampled.items():
            self.tokens[index].append(token)
            if len(self.tokens[index]) == self.limit[index]:
                withdraw(self.state, index, reason="length")
                self.end(index)

    def end(self, index: int) -> None:
        """Note an end."""
        self.ended[index] += 1
        self.tables.pop(index, None)
        self.held.discard(index)

    def waiting(self) -> set[int]:
        """Everything that has not ended, does not run and is not held up."""
        return {index for index in self.tokens if not self.ended[index]} - self.tables.keys() - self.held

    def check_shapes(self, plan: StepPlan) -> None:
        """Budgets, padding, one row a sequence, none for held ones."""
        rows = [row for call in plan.calls for row in call.rows]
        assert plan.token_count == sum(row.count for row in rows) <= self.settings.max_num_batched_tokens
        assert len({row.sequence for row in rows}) == len(rows) <= self.settings.max_num_seqs
        assert not {row.sequence for row in rows} & self.held
        for call in plan.calls:
            assert call.batch in self.settings.batch_sizes
            assert len(call.rows) <= call.batch
            assert call.tokens == 1 or call.tokens % BLOCK == 0
            assert call.context % self.settings.context_multiple == 0
            for row in call.rows:
                assert 1 <= row.count <= min(call.tokens, self.settings.longest_chunk)
                assert row.start <= call.context
                assert row.sample == (row.start + row.count == len(self.tokens[row.sequence]))

    def check_order(self, plan: StepPlan, waiting: set[int]) -> None:
        """Nobody is admitted over the head of one that comes before it; evictions are of the lesser, and bounded."""
        entered = [admission.sequence for admission in plan.admissions]
        if any(one.reason == "kv_full" for one in plan.preemptions):
            assert not entered
        left = waiting - {one.sequence for one in plan.refusals}
        for index in entered:
            left.discard(index)
            if self.settings.policy != "fair":
                assert all(self.place[index] < self.place[other] for other in left)
        for one in plan.preemptions:
            if one.reason == "priority":
                assert any(self.priority[other] < self.priority[one.sequence] for other in entered)
            assert (one.reason == "stalled") == (one.sequence in self.held)
            self.evicted[one.sequence] += one.reason != "stalled"
            most = self.settings.max_preemptions
            assert most is None or self.evicted[one.sequence] <= most
        for one in plan.refusals:
            if one.reason == "deadline_unreachable":
                due = self.deadline[one.sequence]
                steps = -(-len(self.tokens[one.sequence]) // self.settings.longest_chunk)
                assert self.settings.load_shedding and due is not None and self.now_us + steps * STEP_US > due

    def follow(self, plan: StepPlan) -> None:
        """Apply the plan to the shadow tables; what a row reads must be its own tokens under its own owner."""
        for release in plan.releases:
            self.reported[release.sequence] += 1
        for refusal in plan.refusals:
            self.reported[refusal.sequence] += 1
            self.end(refusal.sequence)
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
                owner = self.owner[row.sequence]
                for position in range(row.start):
                    held = self.content[table[position // BLOCK], position % BLOCK]
                    assert held == (owner, tuple(tokens[: position + 1])), "a row reads what is not its own prefix"
                for position in range(row.start, row.start + row.count):
                    place = (table[position // BLOCK], position % BLOCK)
                    self.content[place] = (owner, tuple(tokens[: position + 1]))

    @invariant()
    def accounts_agree(self) -> None:
        """No block is leaked or held twice by mistake; the queue's figures are right."""
        if hasattr(self, "state"):
            assert self.state.cache.problems([one.blocks for one in self.state.running]) == []
            assert {one.index: one.blocks for one in self.state.running} == self.tables
            assert {index for index in self.tokens if index in self.state.waiting} == self.waiting()
            assert self.state.queued_tokens == sum(len(self.tokens[index]) for index in self.waiting())

    @invariant()
    def service_is_fair(self) -> None:
        """The counter of a tenant that has sequences waiting is within one span of the clock."""
        if hasattr(self, "state") and isinstance(queue := self.state.waiting, FairQueue):
            for tenant in queue.lanes:
                ahead = queue.counters[tenant] - queue.clock
                assert 0 <= ahead <= service_gap(self.settings) // 2

    def teardown(self) -> None:
        """Let everything finish, in a computable number of steps: each ends and is reported once, all blocks return."""
        if not hasattr(self, "state"):
            return
        while self.held:
            self.catch_up(0)
        alive = [index for index in self.tokens if not self.ended[index]]
        most = self.settings.max_preemptions
        lives = len(alive) + 1 if most is None else most + 1
        bound = sum(self.limit[index] for index in alive) * lives + 2 * len(alive) + 1
        for _ in range(bound):
            if not self.state.has_work:
                break
            self.step()
        assert not self.state.has_work
        assert all(self.ended[index] == 1 for index in self.tokens)
        assert self.reported == Counter(self.tokens.keys())
        assert self.state.cache.available == self.settings.num_blocks


Engine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestEngine = Engine.TestCase
