"""What a replay under moved arrivals says is what really happens under them, and the score is the real frequency."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from manifests.scheduling import SchedulingManifest
from replay.arrivals import EngineHistory
from replay.blame import evidence, parting
from replay.replanning import Replanner
from replay.sensitivity import measure, shift_arrivals
from runtime.engine.edited_replays import EditedReplays
from runtime.models.random_checkpoint import random_checkpoint
from tests.runtime.engine.recorded import Recording, requests_with_shared_prefixes
from tests.runtime.engine.stepped import arrivals_of, record_steps
from tests.runtime.engine.test_plan_edits import MODEL, ROOMY, TIGHT
from tests.runtime.engine.toy import ToyModel

JITTER = 2


def eager(folder: Path, precision: str) -> ToyModel:
    """A tiny random decoder on eager torch."""
    from runtime.backends.eager import EagerExecutor

    checkpoint = random_checkpoint(
        folder / "model", vocab_size=320, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, max_positions=256,
    )  # fmt: skip
    norm = "unfused" if precision == "bfloat16" else "fused"
    return ToyModel(EagerExecutor.from_checkpoint(checkpoint, precision=precision, norm=norm))  # type: ignore[arg-type]


class Case:
    """A recording with arrivals at known ticks."""

    def __init__(self, model: ToyModel, scheduling: SchedulingManifest, seed: int, *, count: int, vocab: int) -> None:
        draw = random.Random(seed)
        self.model, self.scheduling = model, scheduling
        self.requests = requests_with_shared_prefixes(count, seed=seed, vocab_size=vocab, longest_output=24)
        self.ticks = [JITTER + draw.randrange(3 * count) for _ in self.requests]
        self.recording = self.run([0] * count)

    def run(self, moves: list[int]) -> Recording:
        """Really run all requests, with arrivals moved."""
        ticks = [tick + by for tick, by in zip(self.ticks, moves, strict=True)]
        return record_steps(self.model, self.scheduling, self.requests, ticks)

    def replanner(self, number: int) -> Replanner:
        """Plan again around one request."""
        recording = self.recording
        replays = EditedReplays(
            self.model.executor, None, self.scheduling, recording.plans, recording.sequences, self.requests[number]
        )
        history = EngineHistory(
            arrivals=arrivals_of(self.requests, self.ticks),
            outputs={
                index: (*result.tokens, 0)[: max(1, len(result.tokens))]
                for index, result in enumerate(recording.results)
            },
        )
        return Replanner(replays, history, number, recording.results[number].records)

    def real(self, number: int, *, samples: int, seed: int) -> tuple[int, int]:
        """Count how often bits and tokens of a request part from the recording in runs with jittered arrivals."""
        draw, bits, tokens = random.Random(seed), 0, 0
        for _ in range(samples):
            again = self.run([draw.randint(-JITTER, JITTER) for _ in self.requests]).results[number].records
            recorded = self.recording.results[number].records
            bits += parting("bits", recorded, again) is not None
            tokens += parting("tokens", recorded, again) is not None
        return bits, tokens


@pytest.mark.parametrize(("scheduling", "seed"), [(ROOMY, 3), (TIGHT, 4), (TIGHT, 5)])
def test_a_replay_under_moved_arrivals_is_what_really_happens(scheduling: Any, seed: int) -> None:
    """Prefix hits, chunks and preemptions fall elsewhere; the replayed records are those of a real run, to the bit."""
    case, draw = Case(MODEL, scheduling, seed, count=10, vocab=50), random.Random(seed)
    changed = 0
    for number in range(10):
        replanner = case.replanner(number)
        assert replanner.faithful
        for _ in range(3):
            moves = [draw.randint(-JITTER, JITTER) for _ in case.requests]
            schedule = replanner.schedule(lambda one, moves=moves: moves[one.index])
            real = case.run(moves)
            if [one.tokens for one in real.results] != [one.tokens for one in case.recording.results]:
                continue  # a neighbour's output has another length there: not what the recording knows
            replayed = replanner.records(schedule)
            assert evidence(replayed) == evidence(real.results[number].records)
            changed += evidence(replayed) != evidence(case.recording.results[number].records)
    assert changed > 5


def test_the_score_counts_what_real_runs_count(tmp_path: Path) -> None:
    """On eager float32: thirty samples against thirty real runs of the same size; and single moves are of the kind."""
    case = Case(eager(tmp_path, "float32"), ROOMY, 1, count=5, vocab=250)
    replanner = case.replanner(1)
    score = measure(replanner, jitter=JITTER, samples=30, seed=1)
    assert score.faithful
    assert score.distinct <= 30
    assert score.bits.low <= score.bits.count / 30 <= score.bits.high
    again = measure(case.replanner(1), jitter=JITTER, samples=30, seed=1)
    assert again == score
    bits, tokens = case.real(1, samples=30, seed=2)
    assert abs(bits - score.bits.count) <= 13  # four standard deviations of the difference of two such counts
    assert tokens == score.tokens.count == 0
    shifts = shift_arrivals(replanner, {0, 2})
    assert [(one.sequence, one.by) for one in shifts] == [(0, -1), (0, 1), (1, -1), (1, 1), (2, -1), (2, 1)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_score_is_calibrated_against_a_hundred_real_schedules(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each request's interval against the frequency in a hundred real runs; nearly all intervals of the two meet."""
    from eval.statistics import wilson

    case = Case(eager(tmp_path, precision), ROOMY, 1, count=12, vocab=250)
    lines, apart = [], 0
    draw, reals = random.Random(77), []
    for _ in range(100):
        reals.append(case.run([draw.randint(-JITTER, JITTER) for _ in case.requests]).results)
    for number in range(12):
        recorded = case.recording.results[number].records
        score = measure(case.replanner(number), jitter=JITTER, samples=100, seed=number)
        for layer, rate in (("bits", score.bits), ("tokens", score.tokens)):
            count = sum(parting(layer, recorded, real[number].records) is not None for real in reals)  # type: ignore[arg-type]
            low, high = wilson(count, 100)
            apart += high < rate.low or rate.high < low
            lines.append(
                f"{number} {layer}: sampled {rate.count}, real {count} of 100, {score.distinct} distinct slices"
            )
    with capsys.disabled():
        print(f"\n{precision}: {apart} of {len(lines)} pairs of intervals apart", *lines, sep="\n  ")
    assert apart <= 1
