"""Which cells does a grid have, and how do they compare on the same requests?

All cells share their random numbers: the same requests from the same seed arrive at the same times, and each request
samples with its own seed.  So request n of one cell and request n of another are a pair, and comparisons are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from traces.failures import ClassifiedError

if TYPE_CHECKING:
    from eval.statistics import PairedComparison

FEWEST_PAIRS = 2
"""A bootstrap over pairs needs at least two."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One condition of the grid."""

    backend: str
    precision: str
    max_num_seqs: int
    """Requests that the engine may run at once."""

    @property
    def name(self) -> str:
        """Say the cell in one word, such as ``onnxruntime-float32-8``."""
        return f"{self.backend}-{self.precision}-{self.max_num_seqs}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one cell gave.

    metrics  name to number, as they are tracked; a metric that could not be measured is absent
    latency  end-to-end microseconds of each request in order of arrival; None where it did not answer
    tags     what names the cell's conditions: package, run, digests of the pins
    """

    metrics: Mapping[str, float]
    latency: tuple[int | None, ...]
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One row of the study: what a cell gave, or why it refused."""

    cell: Cell
    measured: Measured | None = None
    against_first: PairedComparison | None = None
    """End-to-end latency, microseconds: this cell minus the first one that was measured."""
    failure_class: str | None = None
    reason: str | None = None

    @property
    def refused(self) -> bool:
        """Say whether the cell could not be run."""
        return self.measured is None

    def to_document(self) -> dict[str, Any]:
        """Return the row as plain JSON."""
        document: dict[str, Any] = {
            "cell": self.cell.name,
            "backend": self.cell.backend,
            "precision": self.cell.precision,
            "max_num_seqs": self.cell.max_num_seqs,
            "refused": None if self.reason is None else {"failure_class": self.failure_class, "reason": self.reason},
        }
        if self.measured is not None:
            document |= {"metrics": dict(self.measured.metrics), "tags": dict(self.measured.tags)}
        if self.against_first is not None:
            one = self.against_first
            document["latency_against_first_us"] = {
                "difference": one.difference,
                "low": one.low,
                "high": one.high,
                "p": one.p,
                "pairs": one.pairs,
                "confidence": one.confidence,
                "conclusion": one.conclusion,
            }
        return document


def grid(backends: Sequence[str], precisions: Sequence[str], batch_sizes: Sequence[int]) -> tuple[Cell, ...]:
    """Return every combination, each once, in the order in which the settings were given."""
    cells = (
        Cell(backend=backend, precision=precision, max_num_seqs=size)
        for backend, precision, size in product(backends, precisions, batch_sizes)
    )
    return tuple(dict.fromkeys(cells))


def run_sweep(
    cells: Iterable[Cell],
    measure: Callable[[Cell], Measured],
    *,
    seed: int,
    on_result: Callable[[CellResult], None] = lambda result: None,
) -> list[CellResult]:
    """Measure each cell in order; a refusal is a result and does not stop the others.

    Args:
        cells: the grid.
        measure: runs one cell; a ClassifiedError is kept with its class.
        seed: of the bootstrap.
        on_result: called with each row as it becomes known.
    """
    results: list[CellResult] = []
    first: Measured | None = None
    for cell in cells:
        try:
            measured = measure(cell)
        except ClassifiedError as error:
            result = CellResult(cell=cell, failure_class=error.failure_class.value, reason=error.message)
        else:
            result = CellResult(cell=cell, measured=measured)
            if first is None:
                first = measured
            else:
                result = replace(result, against_first=compare_latency(first, measured, seed=seed))
        results.append(result)
        on_result(result)
    return results


def compare_latency(first: Measured, other: Measured, *, seed: int) -> PairedComparison | None:
    """Compare end-to-end latency over the requests that both cells answered; None where they are fewer than two."""
    from eval.statistics import paired_bootstrap

    pairs = [
        (before, after)
        for before, after in zip(first.latency, other.latency, strict=True)
        if before is not None and after is not None
    ]
    if len(pairs) < FEWEST_PAIRS:
        return None
    before, after = zip(*pairs, strict=True)
    return paired_bootstrap(before, after, seed=seed)
