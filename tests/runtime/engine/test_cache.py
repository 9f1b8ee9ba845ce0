"""The cache against a model of it: least recently released goes first; and every hit's origin, from the plans alone."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manifests.scheduling import SchedulingManifest
from runtime.engine.cache import BlockCache, Origin, chain_hash, root_hash
from runtime.engine.errors import PlanMissing
from runtime.engine.lineage import block_lineage
from runtime.engine.playback import PlanPlayer
from tests.runtime.engine.recorded import record, requests_with_shared_prefixes
from tests.runtime.engine.toy import ToyExecutor, ToyModel


class Model(RuleBasedStateMachine):
    """Tables that are opened over cached prefixes, grow, are named and are given up; a list keeps who is oldest."""

    @initialize(blocks=st.integers(1, 8), caching=st.booleans())
    def begin(self, blocks: int, caching: bool) -> None:
        """Start with an empty cache."""
        self.cache = BlockCache(blocks, prefix_caching=caching)
        self.blocks, self.caching = blocks, caching
        self.tables: dict[int, list[int]] = {}
        self.texts: dict[int, tuple[int, ...]] = {}
        self.named: dict[tuple[int, ...], int] = {}
        self.oldest: list[int] = []
        self.clock = 0

    def held(self) -> set[int]:
        """Blocks in some table."""
        return {block for table in self.tables.values() for block in table}

    @rule(text=st.lists(st.integers(0, 1), max_size=4).map(tuple))
    def open(self, text: tuple[int, ...]) -> None:
        """A table over a text hits the longest prefix that is named, and nothing else."""
        expected: list[int] = []
        for length in range(1, len(text) + 1):
            if text[:length] not in self.named:
                break
            expected.append(self.named[text[:length]])
        found = self.cache.match(name_of(text[:length]) for length in range(1, len(text) + 1))
        assert found == expected
        assert self.cache.count_evictable(found) == len(set(found) & set(self.oldest))
        for length, block in enumerate(found, 1):
            assert self.cache.acquire(block) == origin_of(text[:length])
            if block in self.oldest:
                self.oldest.remove(block)
        self.clock += 1
        self.tables[self.clock], self.texts[self.clock] = found, text[: len(found)]

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 9), token=st.integers(0, 1), name=st.booleans())
    def grow(self, pick: int, token: int, name: bool) -> None:
        """A new block is free, or is the one that was released longest ago and now forgotten; else there is none."""
        table = sorted(self.tables)[pick % len(self.tables)]
        available = self.blocks - len(self.held())
        assert self.cache.available == available
        unnamed = available - len(self.oldest)
        block = self.cache.allocate()
        assert (block is None) == (available == 0)
        if block is None:
            return
        if unnamed:
            assert block not in self.oldest and block not in self.held()
        else:
            assert block == self.oldest.pop(0)
            self.named = {text: where for text, where in self.named.items() if where != block}
        self.tables[table].append(block)
        text = self.texts[table] = (*self.texts[table], token)
        if name:
            self.cache.register(block, name_of(text), origin_of(text))
            if self.caching and text not in self.named:
                self.named[text] = block

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 9))
    def give_up(self, pick: int) -> None:
        """What nobody reads any more and has a name may be hit until it is evicted; later blocks go before earlier."""
        table = self.tables.pop(sorted(self.tables)[pick % len(self.tables)])
        self.cache.release(table)
        named = set(self.named.values())
        self.oldest += [block for block in reversed(table) if block not in self.held() and block in named]

    @invariant()
    def accounts_agree(self) -> None:
        """The cache finds nothing wrong with itself, and is what the model says."""
        if hasattr(self, "cache"):
            assert self.cache.problems(self.tables.values()) == []
            assert list(self.cache.evictable) == self.oldest
            assert self.cache.block_of == {name_of(text): block for text, block in self.named.items()}


def name_of(text: tuple[int, ...]) -> bytes:
    """Name a block by its text."""
    return repr(text).encode()


def origin_of(text: tuple[int, ...]) -> Origin:
    """A different origin for every text."""
    return Origin(len(text), sum(bit << place for place, bit in enumerate(text)), 0)


Model.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase


def test_chains_of_tenants_and_salts_never_meet_and_the_shared_one_is_none_of_them() -> None:
    roots = [
        root_hash(*one) for one in [("a", ""), ("b", ""), ("a", "b"), ("ab", ""), (None, ""), (None, "a"), ("*", "")]
    ]
    assert len({chain_hash(root, [1, 2]) for root in roots}) == len(roots)


SCHEDULING = SchedulingManifest(max_num_seqs=4, max_num_batched_tokens=32, num_blocks=14)


def test_the_plans_alone_say_which_steps_computed_each_block() -> None:
    """Under evictions and cancellations: every recorded hit reads what the lineage says was computed there."""
    requests = requests_with_shared_prefixes(30, seed=11, vocab_size=50)
    recording = record(ToyModel(ToyExecutor()), SCHEDULING, requests, cancel_every=9)
    lineage = block_lineage(recording.plans, block_size=SCHEDULING.block_size)
    by_step = {plan.step: plan for plan in recording.plans}
    hits = [(plan.step, one.sequence, hit) for plan in recording.plans for one in plan.admissions for hit in one.hits]
    assert hits and any(plan.preemptions for plan in recording.plans)
    for step, reader, hit in hits:
        (content,) = [one for one in lineage[hit.block] if (reader, step) in one.readers]
        before = [written for written in content.steps if written < step]
        assert before[-1] == hit.step
        row = by_step[hit.step].calls[hit.call].row(hit.row)
        assert content.writer == row.sequence
        assert row.start < content.position + SCHEDULING.block_size <= row.start + row.count
    for contents in lineage.values():
        for earlier, later in pairwise(contents):
            assert earlier.until == later.since and earlier.since < later.since
    with pytest.raises(PlanMissing):
        block_lineage(recording.plans[1:], block_size=SCHEDULING.block_size)


def test_a_request_that_read_another_tenants_prefix_replays_from_its_own_tokens() -> None:
    """Where prefixes are shared by all, a hit across tenants is in the slice like any other: same bits, alone."""
    scheduling = SCHEDULING.model_copy(update={"prefix_sharing": "all", "num_blocks": 40})
    requests = [
        msgspec.structs.replace(one, prompt=tuple(range(40)) + one.prompt)
        for one in requests_with_shared_prefixes(12, seed=2, vocab_size=50, longest_output=10)
    ]
    recording = record(ToyModel(ToyExecutor()), scheduling, requests)
    tenant_of = {entry.index: requests[entry.index].tenant for entry in recording.sequences}
    by_step = {plan.step: plan for plan in recording.plans}
    crossed = {
        one.sequence
        for plan in recording.plans
        for one in plan.admissions
        for hit in one.hits
        if tenant_of[by_step[hit.step].calls[hit.call].sequences[hit.row]] != tenant_of[one.sequence]
    }
    assert crossed
    player = PlanPlayer(ToyExecutor(), None, scheduling, recording.plans, recording.sequences)
    for entry in recording.sequences:
        if entry.index in crossed:
            result = next(one for one in recording.results if one.sequence_id == entry.sequence_id)
            request = next(one for one in requests if one.sequence_id == entry.sequence_id)
            assert player.replay(request, recorded=result).document() == result.document()
