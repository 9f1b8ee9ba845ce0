"""What does deciding a step cost, under each policy, and does it stay so with a long queue and a long history?

Every figure is CPU time of one whole step: plan it, enter its tokens, end what ends, admit what waits.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, field

import pytest

from manifests.scheduling import SchedulingManifest
from runtime.engine.scheduler import SchedulerState, complete_step, new_state, plan_step, submit, withdraw
from runtime.engine.settings import Settings

POLICIES = ["fcfs", "priority", "deadline", "fair"]
OUTPUT = 48
PROMPT = 32


@dataclass
class Load:
    """A scheduler that always has a queue."""

    policy: str
    rows: int
    tenants: int = 50
    arrived: int = 0
    given: dict[int, int] = field(default_factory=dict[int, int])

    def __post_init__(self) -> None:
        manifest = SchedulingManifest.model_validate(
            {
                "policy": self.policy,
                "max_num_seqs": self.rows,
                "max_num_batched_tokens": 512,
                "num_blocks": 8 * self.rows,
                "batch_sizes": (1, 8, 32),
            }
        )
        self.settings = Settings.of(manifest, max_positions=2048, max_batch=64, max_tokens=128, max_context=2048)
        self.state: SchedulerState = new_state(self.settings)
        self.draw = random.Random(1)

    def arrive(self, count: int) -> None:
        """Queue so many sequences of many tenants, priorities and deadlines."""
        for _ in range(count):
            submit(
                self.state,
                self.arrived,
                prompt=(self.arrived % 4_096,) * PROMPT,
                max_tokens=OUTPUT,
                tenant=f"tenant-{self.draw.randrange(self.tenants)}",
                priority=self.draw.randrange(10),
                deadline_us=self.draw.randrange(10**9),
                now_us=self.arrived,
            )
            self.arrived += 1

    def step(self) -> None:
        """One step; outputs end staggered, so that most steps end and admit something."""
        plan, self.state = plan_step(self.state)
        sampled = {
            index: 7
            for call in plan.calls
            for row, index in enumerate(call.sequences)
            if not call.silent or row not in call.silent
        }
        complete_step(self.state, plan, sampled)
        for index in sampled:
            self.given[index] = self.given.get(index, index % 7) + 1
            if self.given[index] >= OUTPUT:
                withdraw(self.state, index, reason="length")
                del self.given[index]

    def cpu_us(self, steps: int) -> float:
        """CPU microseconds of a step, mean over so many, so that rare costs count."""
        began = time.thread_time_ns()
        for _ in range(steps):
            self.step()
        return (time.thread_time_ns() - began) / steps / 1_000


@pytest.mark.parametrize("policy", POLICIES)
def test_cost_of_a_step(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures only."""
    figures: list[str] = []
    for rows in (1, 8, 32):
        load = Load(policy, rows)
        load.arrive(60 * rows)
        load.cpu_us(30)
        figures.append(f"{rows}: {load.cpu_us(200):.0f}")
    with capsys.disabled():
        print(f"\nscheduler, us of CPU a step by rows, {policy:9} {', '.join(figures)}")


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tenants", [50, 20_000])
def test_a_hundred_thousand_waiting_do_not_slow_a_step(
    policy: str, tenants: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """In alternation with a short queue: twice as slow at most."""
    short, long = Load(policy, 32, tenants), Load(policy, 32, tenants)
    short.arrive(1_000)
    long.arrive(100_000)
    ratio, one, other = paired(short, long)
    with capsys.disabled():
        print(f"\n{policy:9} {tenants:6} tenants: {one:.0f} us, 1,000 wait; {other:.0f} us, 100,000 wait ({ratio:.2f})")
    assert ratio <= 2


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_finished_ones_cost_nothing(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """After twenty thousand have come and gone a step costs what it cost at first."""
    fresh, old = Load(policy, 32), Load(policy, 32)
    for _ in range(40):
        old.arrive(500)
        for index in list(range(old.arrived - 450, old.arrived)):
            withdraw(old.state, index, reason="cancelled")
            old.given.pop(index, None)
        while len(old.state.waiting) > 5:
            old.step()
    fresh.arrive(1_000)
    old.arrive(1_000)
    ratio, one, other = paired(fresh, old)
    with capsys.disabled():
        print(f"\n{policy:9} {one:.0f} us at first, {other:.0f} us after {old.arrived:,} have gone ({ratio:.2f})")
    assert ratio <= 1.5


def paired(left: Load, right: Load) -> tuple[float, float, float]:
    """Return the ratio of the costs of a step, median over rounds in alternation, and both medians."""
    for load in (left, right):
        load.cpu_us(40)
    pairs = [(left.cpu_us(40), right.cpu_us(40)) for _ in range(12)]
    one, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    return statistics.median(second / first for first, second in pairs), one, other
