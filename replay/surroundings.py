"""What is here to replay with: this machine, the ledger's packages, its evidence, the steps that were recorded?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replay.generations import load_sequence_tables, load_sequences
from replay.plan import Surroundings
from replay.records import RecordedRequest, RecordedRun
from replay.slices import plans_of
from replay.text_models import has_tokenizer
from runtime.engine.slicing import Schedule
from runtime.prepare.store import PackageStore
from runtime.probe import probe
from traces.failures import ClassifiedError

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger


def surroundings_of(ledger: Ledger, run: RecordedRun) -> Surroundings:
    """Look around once for all requests of a run; packages are verified file by file, no model is loaded."""
    store = PackageStore(ledger.layout.root)
    packages: dict[str, str | None] = {}
    slices = _Slices(ledger, run)

    def has_package(package: str) -> str | None:
        if package not in packages:
            packages[package] = _fault(store, package)
        return packages[package]

    def readable(reference: str) -> bool:
        try:
            ledger.read_blob(reference)
        except ClassifiedError:
            return False
        return True

    return Surroundings(
        hardware=probe(),
        has_package=has_package,
        has_tokenizer=lambda pins: has_tokenizer(ledger.layout.root, pins),
        readable=readable,
        missing_steps=slices.missing_steps,
    )


class _Slices:
    """Asks the recorded schedule whether a request's slice is whole."""

    def __init__(self, ledger: Ledger, run: RecordedRun) -> None:
        self._ledger = ledger
        self._plans = plans_of(ledger, run)
        events = [event for request in run.requests.values() for event in request.events]
        self._tables = load_sequence_tables(events)
        self._schedules: dict[tuple[str, int], Schedule] = {}

    def missing_steps(self, request: RecordedRequest) -> tuple[str, ...]:
        """Say what the slices of a request's generations lack; empty when they are whole."""
        pins = request.pins
        if pins is None:
            return ()
        missing: list[str] = []
        for sequence in load_sequences(self._ledger, request.events):
            schedule = self._schedule(sequence.engine_id, pins.scheduling.block_size)
            try:
                lives = schedule.lives_of(sequence.sequence_id)
                for life in lives:
                    schedule.needs(life, own=life.sequence)
            except ClassifiedError as error:
                missing.append(error.message)
                continue
            ran = {placed.step for life in lives for placed in life.rows}
            lost = [] if sequence.result is None else sorted(set(sequence.result.steps) - ran)
            if sequence.result is None or lost:
                missing.append(
                    f"{sequence.sequence_id}: {'its end' if not lost else f'step {lost[0]}'} was not recorded"
                )
        return tuple(missing)

    def _schedule(self, engine_id: str, block_size: int) -> Schedule:
        key = (engine_id, block_size)
        if key not in self._schedules:
            plans, table = self._plans.get(engine_id, ()), self._tables.get(engine_id, ())
            self._schedules[key] = Schedule(plans, table, block_size=block_size)
        return self._schedules[key]


def _fault(store: PackageStore, package: str) -> str | None:
    """Return why a package cannot be used here, or None."""
    from runtime.prepare.load import check_envelope

    try:
        check_envelope(store.verify(package), package)
    except ClassifiedError as error:
        return error.message
    return None
