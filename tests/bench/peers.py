"""How fast is this engine beside others, on one checkpoint, in one run?  `make bench`, or:

    python -m tests.bench.peers [--json FILE] [--only TEXT] [--size medium] [--repetitions N]

Every engine is a process of its own with one compute thread.  They take turns, case by case, so that a busy machine
weighs on all alike; figures are tokens per CPU-second, and ratios are medians over the turns: to transformers, of which
everyone knows the speed, and to onnxruntime-genai, the fastest of the others at decoding.  Decode is
B*64 / (T(65) - T(1)) on prompts of 32 tokens, prefill B*L / T(1); prompts are fresh each time.  Before that, all
generate greedily from the same 128 prompts, and every row that differs from transformers' is told.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.comparison import SIZES, quiet_checkpoint
from tests.bench.installs import Absent, install
from tests.bench.peer import KINDS

REFERENCES = ("transformers", "onnxruntime-genai")
JUDGE = REFERENCES[0]
"""Whose greedy tokens the others' are held against."""
DECODED = 64
COMPARED = [{"batch": 32, "length": 32, "new": 48, "seed": seed} for seed in range(4)]


class Case(NamedTuple):
    """One figure."""

    name: str
    batch: int
    length: int
    decode: bool

    @property
    def tokens(self) -> int:
        """Tokens that the timed part computes."""
        return self.batch * (DECODED if self.decode else self.length)


CASES = (
    Case("decode 1", 1, 32, True),
    Case("decode 8", 8, 32, True),
    Case("decode 32", 32, 32, True),
    Case("prefill 1x1024", 1, 1024, False),
    Case("prefill 8x256", 8, 256, False),
    Case("prefill 32x64", 32, 64, False),
)


class Peer:
    """One engine in its process."""

    def __init__(self, kind: str, checkpoint: Path, work: Path, *, paths: list[Path]) -> None:
        work.mkdir(parents=True)
        variables = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "ORT_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "0",
        }
        search = os.pathsep.join([str(Path.cwd()), *map(str, paths)])
        self._log = (work / "log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.bench.peer", kind, str(checkpoint), str(work / "files")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **variables, "PYTHONPATH": search},
        )
        (work / "files").mkdir()
        self._answer()

    def measure(self, case: Case, seed: int) -> float:
        """Return tokens per CPU-second of one fresh batch."""
        first = self._run(case, new=1, seed=2 * seed)
        if not case.decode:
            return case.tokens / first
        return case.tokens / (self._run(case, new=DECODED + 1, seed=2 * seed + 1) - first)

    def tokens(self) -> list[list[int]]:
        """Generate from the compared prompts; greedy tokens of equal arithmetic are equal."""
        return [row for task in COMPARED for row in self._ask(task)["tokens"]]

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _run(self, case: Case, *, new: int, seed: int) -> float:
        return float(self._ask({"batch": case.batch, "length": case.length, "new": new, "seed": seed})["cpu_s"])

    def _ask(self, task: dict[str, int]) -> dict[str, Any]:
        if self._process.stdin is None:
            raise Absent("its process has no input")
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        answer: dict[str, Any] = json.loads(line) if line else {"failed": "its process ended"}
        if "failed" in answer:
            self.close()
            raise Absent(str(answer["failed"]))
        return answer


def start(kind: str, checkpoint: Path, work: Path, cache: Path) -> Peer:
    """Start one engine; raises Absent with the reason where it is not to be had."""
    folder = work / kind.replace(" ", "-").replace(",", "")
    return Peer(kind, checkpoint, folder, paths=install(kind, cache))


def compare(kinds: list[str], *, cache: Path, repetitions: int, size: str = "small") -> dict[str, Any]:
    """Measure all engines in turns and return figures, ratios to the references, answers, and who is absent."""
    absent: dict[str, str] = {}
    peers: dict[str, Peer] = {}
    with tempfile.TemporaryDirectory(prefix="replaylab-peers-") as folder:
        checkpoint = quiet_checkpoint(Path(folder) / "checkpoint", size)
        try:
            for kind in kinds:
                try:
                    peers[kind] = start(kind, checkpoint, Path(folder), cache)
                except Absent as reason:
                    absent[kind] = str(reason)
            answers = {kind: peer.tokens() for kind, peer in peers.items()}
            figures = take_turns(peers, absent, repetitions=repetitions)
        finally:
            for peer in peers.values():
                peer.close()
    return {"figures": figures, "ratios": ratios(figures), "absent": absent, "answers": answers}


def take_turns(
    peers: dict[str, Peer], absent: dict[str, str], *, repetitions: int
) -> dict[str, dict[str, list[float]]]:
    """Measure every case of every engine; one that fails leaves the comparison, with its figures, for `absent`."""
    figures: dict[str, dict[str, list[float]]] = {kind: {} for kind in peers}
    for case in CASES:
        print(f"{case.name}: {len(figures)} engines, {repetitions} turns", file=sys.stderr, flush=True)
        for turn in range(repetitions + 1):
            for kind in list(figures):
                try:
                    speed = peers[kind].measure(case, turn)
                except Absent as reason:
                    absent[kind] = f"failed at {case.name}: {reason}"
                    del figures[kind]
                    continue
                if turn:  # the first turn warms up
                    figures[kind].setdefault(case.name, []).append(speed)
    return figures


def ratios(figures: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Give each engine's speed over each reference's, median over the turns in which both ran side by side."""
    return {
        reference: {
            kind: {
                name: statistics.median(ours / theirs for ours, theirs in zip(speeds, measured[name], strict=True))
                for name, speeds in cases.items()
            }
            for kind, cases in figures.items()
        }
        for reference in REFERENCES
        if (measured := figures.get(reference)) is not None
    }


def table(found: dict[str, Any]) -> str:
    """Write the comparison for a terminal: tokens per CPU-second, and the ratio to each reference."""
    names = [case.name for case in CASES]
    lines = [
        f"tokens per CPU-second, one thread; times {', times '.join(REFERENCES)}",
        " " * 34 + "".join(f"{name:>20}" for name in names),
    ]
    for kind, cases in found["figures"].items():
        cells = [f"{statistics.median(cases[name]):8.0f}" + _ratios_of(found["ratios"], kind, name) for name in names]
        lines.append(f"{kind:34}" + "".join(f"{cell:>20}" for cell in cells))
    lines += [f"{kind:34}{reason}" for kind, reason in found["absent"].items()]
    return "\n".join([*lines, *judged(found["answers"])])


def _ratios_of(found: dict[str, dict[str, dict[str, float]]], kind: str, name: str) -> str:
    """The ratios of one figure; a dash stands for a reference that is absent."""
    return "".join(f"{found[one][kind][name]:6.2f}" if one in found else f"{'-':>6}" for one in REFERENCES)


def judged(answers: dict[str, list[list[int]]]) -> list[str]:
    """Say whose greedy tokens are the reference's, and where the others' first are not."""
    if JUDGE not in answers:
        return [f"greedy tokens not compared: no {JUDGE}"]
    expected, same, lines = answers[JUDGE], list[str](), list[str]()
    for kind, rows in answers.items():
        parted = [
            next(place for place, (one, other) in enumerate(zip(row, wanted, strict=True)) if one != other)
            for row, wanted in zip(rows, expected, strict=True)
            if row != wanted
        ]
        if parted:
            lines.append(f"greedy tokens of {kind}: {len(parted)} of {len(rows)} prompts differ, from token {parted}")
        elif kind != JUDGE:
            same.append(kind)
    shape = f"{len(expected)} prompts, {len(expected[0])} tokens each"
    return [f"greedy tokens equal to {JUDGE} ({shape}): {'; '.join(same) or 'none'}", *lines]


def main(arguments: list[str] | None = None) -> int:
    """Compare, print the table, and write the figures as JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures into this file")
    parser.add_argument("--only", action="append", metavar="TEXT", help="engines whose name contains this; repeatable")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="turns a case (default: %(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/bench"), help="where peers are installed (%(default)s)"
    )
    options = parser.parse_args(arguments)
    kinds = [kind for kind in KINDS if not options.only or any(text in kind for text in options.only)]
    found = compare(kinds, cache=options.cache.resolve(), repetitions=options.repetitions, size=options.size)
    print(f"{SIZES[options.size].parameters} parameters", table(found), sep="\n")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
