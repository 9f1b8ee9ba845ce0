"""Which sequences run in the next step?  A pure transition from state to plan: no tensor, no clock, no randomness.

`plan_step(state)` consumes the state it is given and returns it advanced; equal states give equal plans, and
`state.copy()` keeps an earlier one.  What happened outside (arrivals, sampled tokens, cancellations, passed deadlines)
enters by `submit`, `complete_step` and `withdraw`.

Order inside a step, as vLLM V1 has it: running sequences with one token left (decode), running prefills, then waiting
ones, first come first served, under `max_num_batched_tokens`.  A running sequence that finds no block evicts the newest
running one, which goes to the front of the queue to be recomputed; a step that preempts admits nothing.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.engine.cache import BlockCache, Origin, chain_hash, root_hash
from runtime.engine.errors import SequenceRefused
from runtime.engine.plan import DECODE, PREFILL, Admission, Call, Hit, Preemption, Release, StepPlan
from runtime.engine.settings import Settings


@dataclass(slots=True)
class SequenceState:
    """What the scheduler knows of one unfinished sequence."""

    index: int
    tokens: list[int]
    """Prompt and output so far."""
    root: bytes
    """Start of its hash chain: tenant and salt."""
    computed: int = 0
    """Tokens whose keys and values are in its blocks."""
    blocks: list[int] = field(default_factory=list[int])
    hashes: list[bytes] = field(default_factory=list[bytes])
    """Chain hashes of its full blocks, as far as they were needed."""
    registered: int = 0
    """Leading blocks that were offered to the prefix cache."""

    def chain(self, blocks: int, block_size: int) -> list[bytes]:
        """Return the hashes of the first `blocks` full blocks, extending what is known."""
        while len(self.hashes) < blocks:
            first = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(chain_hash(parent, self.tokens[first : first + block_size]))
        return self.hashes[:blocks]


@dataclass(slots=True)
class SchedulerState:
    """Everything that decides the next plan."""

    settings: Settings
    cache: BlockCache
    step: int = 0
    """Number of the next step."""
    waiting: OrderedDict[int, SequenceState] = field(default_factory=OrderedDict[int, SequenceState])
    running: list[SequenceState] = field(default_factory=list[SequenceState])
    releases: list[Release] = field(default_factory=list[Release])
    """Ended since the last plan; the next plan reports them."""

    def copy(self) -> SchedulerState:
        """Return an independent state that gives the same plans."""
        return copy.deepcopy(self)

    @property
    def has_work(self) -> bool:
        """Whether another plan would say anything."""
        return bool(self.running or self.waiting or self.releases)


def new_state(settings: Settings) -> SchedulerState:
    """Return the state of an engine that has done nothing yet."""
    return SchedulerState(settings, BlockCache(settings.num_blocks, prefix_caching=settings.enable_prefix_caching))


def check_fits(settings: Settings, prompt_tokens: int, max_tokens: int) -> None:
    """Raise SequenceRefused when a request could not run even alone."""
    needed = prompt_tokens + max_tokens
    if needed > settings.longest_sequence:
        raise SequenceRefused(
            f"{prompt_tokens} prompt tokens and {max_tokens} output tokens exceed the {settings.longest_sequence} "
            "that one sequence may have here",
            reason="sequence_too_long",
            evidence={
                "reservation_failure": {"tokens_needed": needed, "tokens_possible": settings.longest_sequence},
                "memory_pressure": {"num_blocks": settings.num_blocks, "block_size": settings.block_size},
            },
            fix="shorten the prompt, lower max_tokens, or raise num_blocks and the package's bounds",
        )


def submit(
    state: SchedulerState, index: int, *, prompt: tuple[int, ...], max_tokens: int, tenant: str, salt: str = ""
) -> None:
    """Queue a sequence; raises SequenceRefused, leaving the state as it was, when it can never fit."""
    check_fits(state.settings, len(prompt), max_tokens)
    state.waiting[index] = SequenceState(index, list(prompt), root_hash(tenant, salt))


def withdraw(state: SchedulerState, index: int, *, reason: str) -> bool:
    """End a sequence, releasing its blocks now; False when it is not here (any more)."""
    sequence = state.waiting.pop(index, None)
    if sequence is None:
        sequence = next((one for one in state.running if one.index == index), None)
        if sequence is None:
            return False
        state.running.remove(sequence)
    state.cache.release(sequence.blocks)
    sequence.blocks = []
    state.releases.append(Release(index, reason))
    return True


def plan_step(state: SchedulerState) -> tuple[StepPlan, SchedulerState]:
    """Decide the next step: which rows run, in which padded calls, with which blocks."""
    draft = _Draft(state)
    draft.schedule_running()
    if not draft.preemptions:
        draft.schedule_waiting()
    plan = StepPlan(
        step=state.step,
        calls=_group(state.settings, draft.rows),
        admissions=draft.admissions,
        allocations=[[index, *blocks] for index, blocks in draft.allocations.items()],
        releases=state.releases,
        preemptions=draft.preemptions,
    )
    state.releases = []
    state.step += 1
    return plan, state


def complete_step(state: SchedulerState, plan: StepPlan, tokens: Mapping[int, int]) -> None:
    """Enter what the step computed: rows advance, sampled tokens are appended, full blocks become findable."""
    size = state.settings.block_size
    by_index = {sequence.index: sequence for sequence in state.running}
    for number, call in enumerate(plan.calls):
        counts = call.counts or (1,) * len(call.sequences)
        for row, index in enumerate(call.sequences):
            sequence = by_index.get(index)
            if sequence is None:  # withdrawn while the step ran
                continue
            sequence.computed = call.starts[row] + counts[row]
            full = sequence.computed // size
            if full > sequence.registered:
                names = sequence.chain(full, size)
                for block in range(sequence.registered, full):
                    state.cache.register(sequence.blocks[block], names[block], Origin(plan.step, number, row))
                sequence.registered = full
            token = tokens.get(index)
            if token is not None:
                sequence.tokens.append(token)


class _Draft:
    """One step being decided; the token budget and what has been given out so far."""

    def __init__(self, state: SchedulerState) -> None:
        self.state = state
        self.settings = state.settings
        self.budget = state.settings.max_num_batched_tokens
        self.rows: list[tuple[int, int, int, bool]] = []
        self.admissions: list[Admission] = []
        self.allocations: dict[int, list[int]] = {}
        self.preemptions: list[Preemption] = []

    def schedule_running(self) -> None:
        """Give every running sequence its next tokens, decodes first; preempt the newest where blocks run out."""
        running, size = self.state.running, self.settings.block_size
        decodes = [one for one in running if len(one.tokens) - one.computed == 1]
        prefills: list[SequenceState] = []
        if len(decodes) < len(running):
            prefills = [one for one in running if len(one.tokens) - one.computed != 1]
        for sequence in decodes:
            if self.budget <= 0:
                return
            if self.preemptions and sequence.index in self._victims():
                continue
            if sequence.computed == len(sequence.blocks) * size and not self._reserve(sequence, 1):
                continue
            self.rows.append((sequence.index, sequence.computed, 1, True))
            self.budget -= 1
        for sequence in prefills:
            if self.budget <= 0:
                return
            if self.preemptions and sequence.index in self._victims():
                continue
            count = self._chunk(sequence)
            if self._reserve(sequence, count):
                self._add(sequence, count)

    def schedule_waiting(self) -> None:
        """Admit waiting sequences in order while sequences, tokens and blocks last."""
        state, settings = self.state, self.settings
        while state.waiting and len(state.running) < settings.max_num_seqs and self.budget > 0:
            sequence = next(iter(state.waiting.values()))
            hits = self._hits(sequence)
            cached = len(hits) * settings.block_size
            count = min(len(sequence.tokens) - cached, settings.longest_chunk, self.budget)
            fresh = self._blocks_for(cached + count) - len(hits)
            # Alone in the engine a sequence may use what the watermark keeps free: otherwise it would wait for ever.
            spare = settings.watermark_blocks if state.running else 0
            if state.cache.available - state.cache.count_evictable(hits) < fresh + spare:
                return
            state.waiting.popitem(last=False)
            origins = [state.cache.acquire(block) for block in hits]
            sequence.blocks = hits
            sequence.computed = cached
            sequence.registered = len(hits)
            state.running.append(sequence)
            entered = [Hit(block, *origin) for block, origin in zip(hits, origins, strict=True)]
            self.admissions.append(Admission(sequence.index, len(sequence.tokens), entered))
            self._reserve(sequence, count)
            self._add(sequence, count)

    def _chunk(self, sequence: SequenceState) -> int:
        return min(len(sequence.tokens) - sequence.computed, self.settings.longest_chunk, self.budget)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.settings.block_size)

    def _hits(self, sequence: SequenceState) -> list[int]:
        """Find cached blocks for all but the last known token, whose logits are wanted."""
        if not self.settings.enable_prefix_caching:
            return []
        whole = (len(sequence.tokens) - 1) // self.settings.block_size
        return self.state.cache.match(sequence.chain(whole, self.settings.block_size))

    def _victims(self) -> set[int]:
        return {preemption.sequence for preemption in self.preemptions}

    def _reserve(self, sequence: SequenceState, count: int) -> bool:
        """Extend a table to hold `count` more tokens, preempting newest first; False when it was preempted itself."""
        missing = self._blocks_for(sequence.computed + count) - len(sequence.blocks)
        while missing > 0:
            block = self.state.cache.allocate()
            if block is None:
                if self._preempt_newest() is sequence:
                    return False
                continue
            sequence.blocks.append(block)
            self.allocations.setdefault(sequence.index, []).append(block)
            missing -= 1
        return True

    def _preempt_newest(self) -> SequenceState:
        """Take the blocks of the newest running sequence, undoing what this step had given it."""
        state = self.state
        victim = state.running.pop()
        state.cache.release(victim.blocks)
        self.allocations.pop(victim.index, None)
        given = [row for row in self.rows if row[0] == victim.index]
        self.rows = [row for row in self.rows if row[0] != victim.index]
        self.budget += sum(row[2] for row in given)
        self.preemptions.append(Preemption(victim.index, victim.computed))
        victim.blocks, victim.computed, victim.registered = [], 0, 0
        state.waiting[victim.index] = victim
        state.waiting.move_to_end(victim.index, last=False)
        return victim

    def _add(self, sequence: SequenceState, count: int) -> None:
        sample = sequence.computed + count == len(sequence.tokens)
        self.rows.append((sequence.index, sequence.computed, count, sample))
        self.budget -= count


def _group(settings: Settings, rows: list[tuple[int, int, int, bool]]) -> list[Call]:
    """Put rows of equal padded length into one call: the decode call first, then chunks by length."""
    groups: dict[int, list[tuple[int, int, int, bool]]] = {}
    for row in rows:
        groups.setdefault(settings.pad_tokens(row[2]), []).append(row)
    return [
        Call(
            graph=DECODE if tokens == 1 else PREFILL,
            batch=settings.pad_batch(len(group)),
            tokens=tokens,
            context=settings.pad_context(max([row[1] for row in group])),
            sequences=[row[0] for row in group],
            starts=[row[1] for row in group],
            counts=[] if tokens == 1 else [row[2] for row in group],
            silent=[position for position, row in enumerate(group) if not row[3]],
        )
        for tokens, group in sorted(groups.items())
    ]
