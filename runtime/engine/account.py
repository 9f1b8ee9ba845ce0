"""Whose was each microsecond of a sequence's time?  From submission to the end, exactly one owner at every instant.

    waiting, never run before      queue
    waiting after an eviction      preemption, and so is all time until what was lost is computed again
    held up by its reader          delivery
    running                        split at the end of every step, from the end of the step before

A running sequence owns of a step: of each call that it is a row of, its tokens' share of the executor's time
(prefill before its first output token, decode after it); of choosing, its share among the rows that sample (sampling);
the time in its own receiver (delivery); and its tokens' share of what is left of the step: planning, inputs, recording.
Everything else is interference: other rows' shares, calls and receivers, and steps that passed it over.  Shares are
rounded down, so what is left over is interference too, and the parts add up to the whole, always.  A sequence that is
alone in the engine has none.

The end itself, from the last step's end, is delivery where the sequence ended by itself, else it belongs to whatever
the sequence was doing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

from runtime.engine.generation import EngineLatency
from runtime.engine.plan import Call

Owner = Literal["queue", "running", "recovering", "preemption", "delivery"]


class CallTimes:
    """Where one call's microseconds went."""

    __slots__ = ("call", "chose_us", "gave_us", "ran_us", "receivers", "tokens")

    def __init__(self, call: Call, ran_us: int) -> None:
        self.call = call
        self.tokens = sum(call.counts) if call.counts else len(call.sequences)
        self.ran_us = ran_us
        """Executor and cache writes; for a call that failed, until it did."""
        self.chose_us = 0
        """Choosing tokens, grammar and evidence included."""
        self.gave_us = 0
        """In the receivers of all rows."""
        self.receivers: dict[int, int] = {}
        """In the receiver of each sequence that has one."""


class Account:
    """One sequence's time so far; `until_us` is how far it is accounted for."""

    __slots__ = (
        "decode_us",
        "decoding",
        "delivery_us",
        "interference_us",
        "lost",
        "owner",
        "preemption_us",
        "prefill_us",
        "queue_us",
        "sampling_us",
        "until_us",
    )

    def __init__(self, submitted_us: int) -> None:
        self.until_us = submitted_us
        self.owner: Owner = "queue"
        self.lost = 0
        """Tokens that an eviction threw away and that are not computed again yet."""
        self.decoding = False
        self.queue_us = self.prefill_us = self.decode_us = self.interference_us = 0
        self.preemption_us = self.sampling_us = self.delivery_us = 0

    def settle(self, now_us: int) -> None:
        """Give the time until now to its owner; between steps, a running sequence is kept waiting by the engine."""
        elapsed = now_us - self.until_us
        self.until_us = now_us
        if self.owner == "queue":
            self.queue_us += elapsed
        elif self.owner == "running":
            self.interference_us += elapsed
        elif self.owner == "delivery":
            self.delivery_us += elapsed
        else:
            self.preemption_us += elapsed

    def admit(self, now_us: int, *, cached: int) -> None:
        """Enter the running ones, with so many tokens from the cache."""
        self.settle(now_us)
        self.lost = self.lost if self.lost > cached else 0
        self.owner = "recovering" if self.lost else "running"

    def evict(self, now_us: int, *, discarded: int) -> None:
        """Lose the blocks; one that is held up goes on waiting for its reader."""
        self.lost = max(self.lost, discarded)
        if self.owner != "delivery":
            self.owner = "preemption"
        self.settle(now_us)

    def hold(self, now_us: int) -> None:
        """Begin to wait for the reader."""
        self.settle(now_us)
        self.owner = "delivery"

    def resume(self, now_us: int, *, running: bool) -> None:
        """Go on after the reader caught up: as a running sequence, or as an evicted one."""
        self.settle(now_us)
        self.owner = ("recovering" if self.lost else "running") if running else "preemption"

    def ran(self, now_us: int, own_us: int, sampling_us: int, delivery_us: int, computed: int) -> None:
        """Split the time until now, the end of a step that it was a row of."""
        if self.owner == "recovering":
            self.settle(now_us)
            if computed >= self.lost:
                self.owner, self.lost = "running", 0
            return
        interference = now_us - self.until_us - own_us - sampling_us - delivery_us
        self.until_us = now_us
        self.interference_us += interference
        self.sampling_us += sampling_us
        self.delivery_us += delivery_us
        if self.decoding:
            self.decode_us += own_us
        else:
            self.prefill_us += own_us

    def close(self, now_us: int, *, by_itself: bool) -> EngineLatency:
        """Account for the end and return the whole."""
        if by_itself:
            self.owner = "delivery"
        self.settle(now_us)
        return EngineLatency(
            queue_us=self.queue_us,
            prefill_us=self.prefill_us,
            decode_us=self.decode_us,
            interference_us=self.interference_us,
            preemption_us=self.preemption_us,
            sampling_us=self.sampling_us,
            delivery_us=self.delivery_us,
        )


class Accounted(Protocol):
    """A live sequence, as far as its time goes."""

    @property
    def account(self) -> Account: ...
    @property
    def has_output(self) -> bool: ...


def settle_step(
    calls: Iterable[CallTimes], live: Mapping[int, Accounted], running: Iterable[int], *, now_us: int
) -> None:
    """Account for a step that ends now in all sequences that run, those that end with it among them."""
    calls = list(calls)
    spent = sum(one.ran_us + one.chose_us + one.gave_us for one in calls)
    tokens = sum(one.tokens for one in calls)
    for one in calls:
        call, ran_us, given, receivers = one.call, one.ran_us, one.tokens, one.receivers
        starts, counts, silent = call.starts, call.counts, call.silent
        chosen = len(call.sequences) - len(silent)
        choosing = one.chose_us // chosen if chosen else 0
        for row, index in enumerate(call.sequences):
            sequence = live.get(index)
            if sequence is None:  # its call failed: it is accounted for
                continue
            account = sequence.account
            count = counts[row] if counts else 1
            own_us = ran_us * count // given + (now_us - account.until_us - spent) * count // tokens
            sampling_us = 0 if silent and row in silent else choosing
            account.ran(now_us, own_us, sampling_us, receivers.get(index, 0), starts[row] + count)
            account.decoding = sequence.has_output
    for index in running:
        account = live[index].account
        if account.until_us != now_us:
            account.settle(now_us)
