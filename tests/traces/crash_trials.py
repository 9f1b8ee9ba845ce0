"""Does anything acknowledged get lost, or anything doubled, when the process is killed?

    python -m tests.traces.crash_trials --trials 3000 --seed 1

A trial forks a writer that acknowledges each mandatory event over a pipe after ``commit`` returned, and kills it with
SIGKILL at a random moment; the next writer starts on what is left.  Kills land in recording, sealing, draining,
compacting and rebuilding.  After ten kills a last drain must find every acknowledged event once, and the ledger intact.
``--broken`` runs a deliberately wrong build that the trials must catch.  This process itself never opens a database: it
only forks, so that every child starts clean.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import duckdb  # noqa: F401  imported before the forks, used after them
import pyarrow.parquet  # noqa: F401

from traces.ledger.drain import Drainer
from traces.ledger.ledger import Ledger
from traces.ledger.segments import Segments
from traces.recorder import Recorder

TRIALS_PER_LEDGER = 10
MODES = ("record", "drain", "record", "upkeep", "drain")
LONGEST_MS = {"record": 60, "drain": 250, "upkeep": 400}


@dataclass
class Outcome:
    """What all trials together showed."""

    trials: int = 0
    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    findings: int = 0
    unacknowledged: int = 0
    """Mandatory events on disk whose acknowledgement the kill cut off: allowed, and expected."""
    modes: dict[str, int] = field(default_factory=dict[str, int])
    details: list[str] = field(default_factory=list[str])

    @property
    def ok(self) -> bool:
        """Whether nothing was lost, doubled or found damaged."""
        return self.lost == self.doubled == self.findings == 0


def _record(path: Path, trial: int, pipe: int, *, queued_only: bool) -> None:
    """Commit for ever, acknowledging each event when it is durable (the broken build: when it is queued)."""
    with Recorder(path, run_id=f"run_{trial}", component="writer") as recorder:
        number = 0
        while True:
            number += 1
            name = f"{trial}.{number}"
            recorder.emit("optional", batch_id=f"o{name}")
            reference = recorder.put_blob(f"blob {name}".encode())
            if queued_only:
                recorder.emit("mandatory", batch_id=name, result_ref=reference)
                time.sleep(0.001)
            else:
                recorder.commit("mandatory", batch_id=name, result_ref=reference)
            os.write(pipe, f"{name}\n".encode())


def _child(path: Path, trial: int, mode: str, pipe: int, *, broken: str | None) -> None:
    if broken == "delete-first":
        _delete_before_sealing()
    queued_only = broken == "acknowledge-queued"
    if mode == "record":
        _record(path, trial, pipe, queued_only=queued_only)
        return
    writer = threading.Thread(
        target=_record, args=(path, trial, pipe), kwargs={"queued_only": queued_only}, daemon=True
    )
    writer.start()
    ledger = Ledger(path)
    while True:
        ledger.drain()
        if mode == "upkeep" and ledger.layout.database.exists():
            ledger.compact()
            ledger.rebuild()


def _delete_before_sealing() -> None:
    """The broken build: rows leave the outbox before their segment is durable."""
    seal = Segments.seal

    def wrong(self: Segments, rows: Any, **settings: Any) -> Any:
        import sqlite3

        for outbox in {row.outbox for row in rows}:
            connection = sqlite3.connect(self.layout.outbox / f"{outbox}.sqlite")
            connection.execute("DELETE FROM event WHERE seq <= ?", (max(r.seq for r in rows if r.outbox == outbox),))
            connection.commit()
            connection.close()
        return seal(self, rows, **settings)

    Segments.seal = wrong  # type: ignore[method-assign]


def _check(path: Path, pipe: int) -> None:
    """Drain, verify and report every mandatory event (in a process of its own)."""
    ledger = Ledger(path)
    ledger.drain()
    report = ledger.verify()
    events = ledger.events(event_type="mandatory")
    names = [event.batch_id for event in events]
    unreadable = 0
    for event in events[-20:]:
        try:
            ledger.read_blob(event.result_ref or "")
        except Exception:  # any failure to read acknowledged evidence counts
            unreadable += 1
    findings = [finding.detail for finding in report.findings] + ["evidence lost"] * unreadable
    left = sorted(file.name for file in (path / "outbox").iterdir())
    if left:
        findings.append(f"left in the outbox: {left}")
    os.write(pipe, json.dumps({"names": names, "findings": findings}).encode())


def _fork(work: Callable[[int], None]) -> tuple[int, int]:
    """Run work in a child; return its process id and the reading end of its pipe."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        code = 1
        try:
            work(write_end)
            code = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(write_end)
    return child, read_end


def _read_all(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def one_trial(path: Path, trial: int, chance: random.Random, outcome: Outcome, *, broken: str | None) -> set[str]:
    """Run and kill one writer; return what it had acknowledged."""
    mode = MODES[trial % len(MODES)]
    child, pipe = _fork(lambda end: _child(path, trial, mode, end, broken=broken))
    first = os.read(pipe, 1)  # the kill clock starts when the writer works
    time.sleep(chance.uniform(0.001, LONGEST_MS[mode] / 1_000))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    text = (first + _read_all(pipe)).decode()
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        outcome.findings += 1
        outcome.details.append(f"trial {trial} ({mode}): the writer ended by itself with status {status}")
    outcome.trials += 1
    outcome.modes[mode] = outcome.modes.get(mode, 0) + 1
    return set(text[: text.rfind("\n") + 1].split())


def run_trials(trials: int, *, seed: int, broken: str | None = None, progress: bool = False) -> Outcome:
    """Run trials, a fresh ledger every ten; one seed repeats the kill moments."""
    chance = random.Random(seed)
    outcome = Outcome()
    while outcome.trials < trials:
        folder = Path(tempfile.mkdtemp(prefix="crash-"))
        path = folder / "ledger"
        acknowledged: set[str] = set()
        for _ in range(min(TRIALS_PER_LEDGER, trials - outcome.trials)):
            acknowledged |= one_trial(path, outcome.trials, chance, outcome, broken=broken)
        _judge(path, acknowledged, outcome)
        outcome.acknowledged += len(acknowledged)
        if outcome.ok or broken:
            shutil.rmtree(folder, ignore_errors=True)
        if progress:
            print(f"{outcome.trials} trials, {outcome.acknowledged} acknowledged, ok={outcome.ok}", file=sys.stderr)
    return outcome


def _judge(path: Path, acknowledged: set[str], outcome: Outcome) -> None:
    child, pipe = _fork(lambda end: _check(path, end))
    text = _read_all(pipe)
    _, status = os.waitpid(child, 0)
    if status != 0 or not text:
        outcome.findings += 1
        outcome.details.append(f"after trial {outcome.trials}: the check itself failed in {path}")
        return
    answer = json.loads(text)
    counts = Counter(answer["names"])
    lost = acknowledged - set(counts)
    doubled = [name for name, count in counts.items() if count > 1]
    outcome.lost += len(lost)
    outcome.doubled += len(doubled)
    outcome.findings += len(answer["findings"])
    outcome.unacknowledged += len(set(counts) - acknowledged)
    if lost or doubled or answer["findings"]:
        found = (sorted(lost)[:3], doubled[:3], answer["findings"][:3])
        outcome.details.append(f"after trial {outcome.trials} in {path}: lost, doubled, findings = {found}")


def main() -> int:
    """Run the trials and print what they showed; exit 1 when anything was lost, doubled or damaged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--broken", choices=("acknowledge-queued", "delete-first"), default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    outcome = run_trials(arguments.trials, seed=arguments.seed, broken=arguments.broken, progress=not arguments.json)
    document = {"ok": outcome.ok, **asdict(outcome), "load": os.getloadavg()[0], "seed": arguments.seed}
    if outcome.ok:
        # Zero of N proves only a rate below 3/N at 95 per cent.
        document["upper_bound_95"] = 3 / outcome.trials
    print(json.dumps(document))
    return 0 if outcome.ok else 1


if __name__ == "__main__":
    _ = Drainer  # the modules a child needs are loaded before the first fork
    sys.exit(main())
