"""How is one step decided?  Rows, admissions, preemptions and refusals under one token budget.

Order inside a step, as vLLM V1 has it: running sequences with one token left (decode), running prefills, then waiting
ones in the policy's order.  A running sequence that finds no block takes those of the running one that yields first;
that one waits again, to be recomputed; such a step admits nothing.  Nothing yields more often than `max_preemptions`
times: when nobody may, the one without a block sits out the step, and when that leaves no row at all, the last in the
order is refused, so that the others go on.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter

from runtime.engine.plan import DECODE, PREFILL, Admission, Call, Hit, Preemption, Refusal
from runtime.engine.scheduled import PlannedRow, SequenceState
from runtime.engine.settings import Settings
from runtime.engine.state import SchedulerState


class Draft:
    """One step being decided; the token budget and what has been given out so far.

    now_us, step_us: the time and a step's duration to reckon deadlines with; None reckons nothing.
    """

    def __init__(self, state: SchedulerState, *, now_us: int | None, step_us: int | None) -> None:
        self.state = state
        self.settings = state.settings
        self.budget = state.settings.max_num_batched_tokens
        self.rows: list[PlannedRow] = []
        self.admissions: list[Admission] = []
        self.allocations: dict[int, list[int]] = {}
        self.preemptions: list[Preemption] = []
        self.refusals: list[Refusal] = []
        self.held: list[int] = []
        self._now_us = now_us
        self._step_us = step_us
        self._gone: set[int] = set()
        """Running sequences that this step evicted."""
        self._stuck = False
        """Whether one found no block and nobody might yield."""
        self._charging = state.settings.policy == "fair"

    def decide(self) -> None:
        """Fill the step."""
        self._schedule_running()
        if self._stuck and not self.rows and not self.preemptions:
            self._give_up()
        elif not self.preemptions and not self._stuck:
            self._shed()
            self._schedule_waiting()

    def _schedule_running(self) -> None:
        """Give every running sequence its next tokens, decodes first."""
        size = self.settings.block_size
        decodes: list[SequenceState] = []
        prefills: list[SequenceState] = []
        for one in self.state.running:
            if one.held:
                self.held.append(one.index)
            elif len(one.tokens) - one.computed == 1:
                decodes.append(one)
            else:
                prefills.append(one)
        for sequence in decodes:
            if self.budget <= 0:
                return
            if sequence.index in self._gone:
                continue
            if sequence.computed == len(sequence.blocks) * size and not self._reserve(sequence, 1):
                continue
            self.rows.append((sequence.index, sequence.computed, 1, True))
            self.budget -= 1
            if self._charging:
                self.state.waiting.charge(sequence, sequence.computed + 1)
        for sequence in prefills:
            if self.budget <= 0:
                return
            if sequence.index in self._gone:
                continue
            count = self._chunk(sequence)
            if self._reserve(sequence, count):
                self._add(sequence, count)

    def _shed(self) -> None:
        """Refuse those at the head that cannot have their first token before their deadline, at the pace reckoned."""
        if not self.settings.load_shedding or self._now_us is None or self._step_us is None:
            return
        while (head := self.state.waiting.head()) is not None:
            if head.deadline_us is None or head.preemptions:  # one that ran before has something to give: it goes on
                return
            left = len(head.tokens) - len(self._hits(head)) * self.settings.block_size
            steps = -(-left // self.settings.longest_chunk)
            if self._now_us + steps * self._step_us <= head.deadline_us:
                return
            self.state.take()
            self.refusals.append(Refusal(head.index, "deadline_unreachable", self._now_us, self._step_us))

    def _schedule_waiting(self) -> None:
        """Admit waiting sequences in the policy's order while sequences, tokens and blocks last."""
        state, settings = self.state, self.settings
        while self.budget > 0 and (sequence := state.waiting.head()) is not None:
            if sequence.index in self._gone:
                return
            full = len(state.running) >= settings.max_num_seqs
            weaker = self._weaker(sequence)
            if full and not weaker:
                return
            hits = self._hits(sequence)
            cached = len(hits) * settings.block_size
            count = min(len(sequence.tokens) - cached, settings.longest_chunk, self.budget)
            fresh = self._blocks_for(cached + count) - len(hits)
            # Alone in the engine a sequence may use what the watermark keeps free: otherwise it would wait for ever.
            spare = settings.watermark_blocks if state.running else 0
            missing = fresh + spare - (state.cache.available - state.cache.count_evictable(hits))
            if not full and missing <= 0:
                self._admit(state.take(), hits, count)
            elif not self._make_room(weaker, missing, keep=hits):
                return

    def _admit(self, sequence: SequenceState, hits: list[int], count: int) -> None:
        """Let a sequence run, beginning with the blocks that it hit and `count` tokens."""
        running = self.state.running
        origins = [self.state.cache.acquire(block) for block in hits]
        sequence.blocks = hits
        sequence.computed = len(hits) * self.settings.block_size
        sequence.registered = len(hits)
        if self._charging:
            sequence.charged = max(sequence.charged, sequence.computed)
            self.state.waiting.charge(sequence, len(sequence.tokens))
            running.append(sequence)
        elif running and sequence.key < running[-1].key:
            insort(running, sequence, key=lambda one: one.key)
        else:
            running.append(sequence)
        entered = [Hit(block, *origin) for block, origin in zip(hits, origins, strict=True)]
        self.admissions.append(Admission(sequence.index, len(sequence.tokens), entered))
        self._reserve(sequence, count)
        self._add(sequence, count)

    def _weaker(self, sequence: SequenceState) -> list[SequenceState]:
        """Find the running sequences that yield to a waiting one: held up by their readers, or of a lesser level.

        A lesser one yields only where the waiting one also comes first: one that aged past it stays.
        """
        if self.settings.policy != "priority":
            return [one for one in self.state.running if one.held]
        limit = self.settings.max_preemptions
        return [
            one
            for one in self.state.running
            if one.held
            or (
                one.priority > sequence.priority
                and one.key > sequence.key
                and (limit is None or one.preemptions < limit)
            )
        ]

    def _make_room(self, weaker: list[SequenceState], missing: int, *, keep: list[int]) -> bool:
        """Evict one of the weaker; nobody is evicted where all together would not free the missing blocks.

        keep: blocks that the waiting one would read, so that nothing is won by their release.
        """
        state = self.state
        reads = Counter(block for one in weaker for block in one.blocks if block not in keep)
        freed = sum(state.cache.references[block] == count for block, count in reads.items())
        if not weaker or missing > freed:
            return False
        victim = max(weaker, key=lambda one: (one.held, state.waiting.yielding(one)))
        self._preempt(victim, "stalled" if victim.held else "priority")
        return True

    def _give_up(self) -> None:
        """Refuse the running sequence that comes last, so that the others find blocks."""
        state = self.state
        last = max((one for one in state.running if not one.held), key=state.waiting.yielding)
        state.running.remove(last)
        state.cache.release(last.blocks)
        self.allocations.pop(last.index, None)
        self.refusals.append(Refusal(last.index, "preemption_limit"))

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

    def _reserve(self, sequence: SequenceState, count: int) -> bool:
        """Extend a table to hold `count` more tokens, evicting others; False when it was evicted itself, or waits."""
        missing = self._blocks_for(sequence.computed + count) - len(sequence.blocks)
        while missing > 0:
            block = self.state.cache.allocate()
            if block is None:
                victim = self._victim()
                if victim is None:
                    self._stuck = True
                    return False
                self._preempt(victim, "stalled" if victim.held else "kv_full")
                if victim is sequence:
                    return False
                continue
            sequence.blocks.append(block)
            self.allocations.setdefault(sequence.index, []).append(block)
            missing -= 1
        return True

    def _victim(self) -> SequenceState | None:
        """Return who yields first: those held up by their readers, then the last in order that may still be evicted."""
        running, limit = self.state.running, self.settings.max_preemptions
        candidates = [one for one in running if one.held]
        if not candidates:
            candidates = running if limit is None else [one for one in running if one.preemptions < limit]
        return max(candidates, key=self.state.waiting.yielding, default=None)

    def _preempt(self, victim: SequenceState, reason: str) -> None:
        """Take the blocks of a running sequence, undoing what this step had given it."""
        state = self.state
        state.running.remove(victim)
        state.cache.release(victim.blocks)
        self.allocations.pop(victim.index, None)
        given = [row for row in self.rows if row[0] == victim.index]
        self.rows = [row for row in self.rows if row[0] != victim.index]
        self.budget += sum(row[2] for row in given)
        self.preemptions.append(Preemption(victim.index, victim.computed, reason))
        self._gone.add(victim.index)
        victim.blocks, victim.computed, victim.registered = [], 0, 0
        victim.preemptions += reason != "stalled"
        if victim.held:
            self.held.remove(victim.index)
        state.requeue(victim)

    def _add(self, sequence: SequenceState, count: int) -> None:
        sample = sequence.computed + count == len(sequence.tokens)
        self.rows.append((sequence.index, sequence.computed, count, sample))
        self.budget -= count


def keep_places(before: list[int], rows: list[PlannedRow]) -> list[PlannedRow]:
    """Order the rows of a decode call so that every sequence that was in the one before keeps its row.

    before: the sequences of that call's rows.  New ones take the rows of those that left, or stand at the end; where
    more left than came, the last rows move into the holes, so that no more move than left.
    """
    if [row[0] for row in rows] == before:
        return rows
    coming = {row[0]: row for row in rows}
    if len(rows) == len(before) and coming.keys() == set(before):
        return [coming[index] for index in before]
    kept = [coming.pop(index, None) for index in before]
    new = list(coming.values())
    if len(kept) + len(new) > len(rows):
        new.reverse()
        for place in [place for place, row in enumerate(kept) if row is None]:
            if new:
                kept[place] = new.pop()
                continue
            while kept and kept[-1] is None:
                kept.pop()
            if place < len(kept):
                kept[place] = kept.pop()
        new.reverse()
    return [row for row in kept if row is not None] + new


def group(settings: Settings, rows: list[PlannedRow], before: list[int]) -> list[Call]:
    """Put rows of equal padded length into one call: the decode call first, then chunks by length.

    before: the sequence of each row of the last decode call, where rows are to stay in their places.
    """
    groups: dict[int, list[PlannedRow]] = {}
    for row in rows:
        tokens = 1 if row[2] == 1 else settings.pad_tokens(row[2])
        groups.setdefault(tokens, []).append(row)
    if settings.stable_rows and 1 in groups:
        groups[1] = keep_places(before, groups[1])
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
