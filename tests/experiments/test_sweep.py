"""A grid has every combination once, a refusal is a row, and comparisons pair the same requests."""

from __future__ import annotations

from io import StringIO

import pytest

from experiments.studies.compilers import batch_sizes
from experiments.studies.table import study_table
from experiments.sweep import Cell, CellResult, Measured, compare_latency, grid, run_sweep
from traces.failures import ClassifiedError, FailureClass


def measured(*latency: int | None) -> Measured:
    return Measured(metrics={"replay_faithful_exact_rate": 1.0, "replay_faithful_requests": 2.0}, latency=latency)


def test_grid_has_every_combination_once_in_the_order_given() -> None:
    cells = grid(("eager", "onnxruntime"), ("float32",), (8, 1, 8))
    assert [cell.name for cell in cells] == [
        "eager-float32-8", "eager-float32-1", "onnxruntime-float32-8", "onnxruntime-float32-1",
    ]  # fmt: skip


def refusing(cell: Cell) -> Measured:
    if cell.precision == "bfloat16":
        raise ClassifiedError("no bfloat16 here", failure_class=FailureClass.ARTIFACT_COMPATIBILITY)
    return measured(*(100 + 10 * cell.max_num_seqs + n for n in range(8)))


def test_a_refused_cell_is_a_row_with_its_class_and_the_rest_goes_on() -> None:
    kept: list[CellResult] = []
    results = run_sweep(grid(("eager",), ("bfloat16", "float32"), (1, 2)), refusing, seed=0, on_result=kept.append)
    assert kept == results
    assert [result.failure_class for result in results] == ["artifact_compatibility"] * 2 + [None] * 2
    assert results[2].against_first is None  # the first that was measured
    assert results[3].against_first is not None
    assert results[3].against_first.difference == 10
    refused = results[0].to_document()["refused"]
    assert refused == {"failure_class": "artifact_compatibility", "reason": "no bfloat16 here"}


def test_pairs_are_requests_that_both_cells_answered() -> None:
    compared = compare_latency(measured(10, None, 30, 40), measured(11, 20, None, 42), seed=0)
    assert compared is not None
    assert (compared.pairs, compared.difference) == (2, 1.5)
    assert compare_latency(measured(10, None), measured(None, 20), seed=0) is None


def test_an_unexpected_error_is_not_swallowed() -> None:
    def broken(cell: Cell) -> Measured:
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_sweep(grid(("eager",), ("float32",), (1,)), broken, seed=0)


def test_calls_are_padded_to_powers_of_two_and_the_most() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(8) == (1, 2, 4, 8)
    assert batch_sizes(6) == (1, 2, 4, 6)


def test_table_shows_rates_and_refusals() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=StringIO())
    console.print(study_table(run_sweep(grid(("eager",), ("float32", "bfloat16"), (1, 2)), refusing, seed=0)))
    text = console.export_text()
    assert "eager float32 1" in text
    assert text.count("refused") == 2
    assert "2/2" in text
