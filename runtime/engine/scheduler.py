"""Which sequences run in the next step?  A pure transition from state to plan: no tensor, no clock, no randomness.

`plan_step(state)` consumes the state it is given and returns it advanced; equal states give equal plans, and
`state.copy()` keeps an earlier one.  What happened outside enters by `submit` (arrivals), `complete_step` (sampled
tokens), `withdraw` (cancellations, passed deadlines), `hold` and `resume` (readers that fall behind and catch up).
Time is an argument like any other, and stands in the plan where it decided something.

The order of service is the policy's (`policies`); what happens inside a step stands in `draft`.
"""

from __future__ import annotations

from collections.abc import Mapping

from runtime.engine.cache import Origin, root_hash
from runtime.engine.draft import Draft, group
from runtime.engine.errors import SequenceRefused
from runtime.engine.plan import Release, StepPlan
from runtime.engine.policies import rank
from runtime.engine.scheduled import SequenceState
from runtime.engine.settings import Settings
from runtime.engine.state import SchedulerState, new_state

__all__ = [
    "SchedulerState",
    "check_fits",
    "complete_step",
    "hold",
    "new_state",
    "plan_step",
    "resume",
    "submit",
    "withdraw",
]


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
    state: SchedulerState,
    index: int,
    *,
    prompt: tuple[int, ...],
    max_tokens: int,
    tenant: str,
    salt: str = "",
    priority: int = 0,
    deadline_us: int | None = None,
    now_us: int = 0,
) -> None:
    """Queue a sequence; raises SequenceRefused, leaving the state as it was, when it never fits or the queue is full.

    priority: lower is served first, under that policy.  deadline_us, now_us: on one clock of the caller's.
    """
    settings = state.settings
    check_fits(settings, len(prompt), max_tokens)
    _check_queue(state, len(prompt))
    order = rank(settings, step=state.step, now_us=now_us, priority=priority, deadline_us=deadline_us)
    sequence = SequenceState(
        index,
        list(prompt),
        root_hash(None if settings.share_prefixes else tenant, salt),
        tenant=tenant,
        priority=priority,
        deadline_us=deadline_us,
        key=(order, state.arrivals),
    )
    state.arrivals += 1
    state.requeue(sequence)


def _check_queue(state: SchedulerState, tokens: int) -> None:
    """Raise SequenceRefused when the queue takes no more; one in which nobody has to wait takes anything."""
    settings, depth = state.settings, len(state.waiting)
    most, most_tokens = settings.max_num_queued_reqs, settings.max_num_queued_tokens
    left, left_tokens = _left_over(state)
    full = most is not None and left >= most
    if not left or not (full or (most_tokens is not None and left_tokens + tokens > most_tokens)):
        return
    raise SequenceRefused(
        f"{depth} sequences with {state.queued_tokens} tokens wait already"
        + (f", {depth - left} of them for the next step; " if left < depth else "; ")
        + (f"{most} may wait longer" if full else f"{tokens} tokens more would exceed {most_tokens}"),
        reason="queue_full",
        evidence={
            "queue_depth": depth,
            "queued_tokens": state.queued_tokens,
            "excess": {
                "sequences": 0 if most is None else max(0, left + 1 - most),
                "tokens": 0 if most_tokens is None else min(left_tokens, left_tokens + tokens - most_tokens),
            },
            "reservation_failure": "max_num_queued_reqs" if full else "max_num_queued_tokens",
            "memory_pressure": {"free_blocks": state.cache.available, "num_blocks": settings.num_blocks},
        },
        fix="send it again after `retry_after_us`, or raise scheduling.max_num_queued_reqs and max_num_queued_tokens",
    )


def _left_over(state: SchedulerState) -> tuple[int, int]:
    """Return how many waiting sequences, with how many tokens, find neither a free place nor free blocks now.

    All are reckoned at their mean length: who is how long is not looked at, so that a long queue costs nothing.
    """
    settings, depth = state.settings, len(state.waiting)
    if not depth:
        return 0, 0
    room = max(0, state.cache.available - settings.watermark_blocks) * settings.block_size
    left = depth - min(depth, settings.max_num_seqs - len(state.running), depth * room // state.queued_tokens)
    return left, state.queued_tokens * left // depth


def withdraw(state: SchedulerState, index: int, *, reason: str) -> bool:
    """End a sequence, releasing its blocks now; False when it is not here (any more)."""
    sequence = state.waiting.remove(index)
    if sequence is not None:
        state.queued_tokens -= len(sequence.tokens)
    else:
        sequence = state.parked.pop(index, None)
    if sequence is None:
        sequence = state.find(index)
        if sequence is None:
            return False
        state.running.remove(sequence)
    state.cache.release(sequence.blocks)
    sequence.blocks = []
    state.releases.append(Release(index, reason))
    return True


def hold(state: SchedulerState, index: int) -> bool:
    """Pass a running sequence over until `resume`; False when it does not run.

    It keeps its blocks as long as nobody else needs them or its place; then it is the first to be evicted.
    """
    sequence = state.find(index)
    if sequence is None:
        return False
    sequence.held = True
    return True


def resume(state: SchedulerState, index: int) -> bool:
    """Let a held sequence go on: at once where it kept its blocks, else from its old place in the queue."""
    sequence = state.parked.pop(index, None)
    if sequence is not None:
        sequence.held = False
        state.requeue(sequence)
        return True
    sequence = state.find(index)
    if sequence is None or not sequence.held:
        return False
    sequence.held = False
    return True


def plan_step(
    state: SchedulerState, *, now_us: int | None = None, step_us: int | None = None
) -> tuple[StepPlan, SchedulerState]:
    """Decide the next step: which rows run, in which padded calls, with which blocks.

    now_us, step_us: the time, and the shortest step to reckon with, for load shedding; None sheds nothing.
    """
    draft = Draft(state, now_us=now_us, step_us=step_us)
    draft.decide()
    calls = group(state.settings, draft.rows, state.decoding)
    state.decided = draft.rows
    state.decoding = calls[0].sequences if calls and calls[0].tokens == 1 else []
    plan = StepPlan(
        step=state.step,
        calls=calls,
        admissions=draft.admissions,
        allocations=[[index, *blocks] for index, blocks in draft.allocations.items()],
        releases=state.releases,
        preemptions=draft.preemptions,
        refusals=draft.refusals,
        held=draft.held,
    )
    state.releases = []
    state.step += 1
    return plan, state


def complete_step(state: SchedulerState, plan: StepPlan, tokens: Mapping[int, int]) -> None:
    """Enter what the step computed: rows advance, sampled tokens are appended, full blocks become findable."""
    size = state.settings.block_size
    by_index = {sequence.index: sequence for sequence in state.running}
    filled: dict[int, Origin] = {}
    for number, call in enumerate(plan.calls):
        counts = call.counts or (1,) * len(call.sequences)
        for row, index in enumerate(call.sequences):
            sequence = by_index.get(index)
            if sequence is None:  # withdrawn while the step ran
                continue
            sequence.computed = call.starts[row] + counts[row]
            if sequence.computed // size > sequence.registered:
                filled[index] = Origin(plan.step, number, row)
            token = tokens.get(index)
            if token is not None:
                sequence.tokens.append(token)
    if filled:
        _register(state, by_index, filled)


def _register(state: SchedulerState, by_index: Mapping[int, SequenceState], filled: Mapping[int, Origin]) -> None:
    """Make full blocks findable, call by call, in the order of service: of two with equal content the first is kept."""
    order = list(filled)
    if len(order) > 1:
        rank = {row[0]: place for place, row in enumerate(state.decided)}
        order.sort(key=lambda index: (filled[index].call, rank[index]))
    for index in order:
        sequence = by_index[index]
        full = sequence.computed // state.settings.block_size
        names = sequence.chain(full, state.settings.block_size)
        for block in range(sequence.registered, full):
            state.cache.register(sequence.blocks[block], names[block], filled[index])
        sequence.registered = full
