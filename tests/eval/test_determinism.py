"""Determinism: unique outputs, spans to the first difference, equal bits, and the tolerance of unchanged runs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.determinism import logprob_drift, output_of, repeatability, tolerance_of, widest
from eval.divergence import compare
from eval.records import GenerationRecord, RequestRecord, TokenRecord, Tolerance
from tests.strategies import request_records


def _request(tokens: str, bits: str | None = None, logprob: float = -1.0) -> RequestRecord:
    records = tuple(
        TokenRecord(ord(token), None if bits is None else bit, logprob, 1.0)
        for token, bit in zip(tokens, bits or tokens, strict=True)
    )
    return RequestRecord("req", generations=(GenerationRecord("prompt", records, "stop"),), terminal_status="ok")


def test_equal_runs_are_deterministic_to_the_bit() -> None:
    found = repeatability([_request("abcd", "0000")] * 3)
    assert (found.unique_outputs, found.commonest, found.deterministic) == (1, 3, True)
    assert (found.bit_equality, found.runs_bit_equal, found.flip_rate) == (1.0, 2, 0.0)
    assert found.first_spans == (4, 4) and found.second_spans == ()
    assert found.tolerance == Tolerance(0.0, 0.0, "A/A of 3 runs")


def test_spans_and_flips_are_counted_from_the_first_run() -> None:
    runs = [
        _request("abcdef", "000000"),
        _request("abXdeY", "001111"),
        _request("abcdef", "011111"),
        _request("abc", "000"),
    ]
    found = repeatability(runs)
    assert (found.repeats, found.unique_outputs, found.commonest) == (4, 3, 2)
    assert found.first_spans == (2, 6, 3)
    assert found.second_spans == (2, 0)
    assert (found.positions_compared, found.positions_bit_equal, found.runs_bit_equal) == (15, 6, 0)
    assert (found.steps_in_step, found.flips_in_step) == (13, 2)
    assert found.flip_rate == 2 / 13


def test_without_digests_nothing_is_said_about_bits() -> None:
    found = repeatability([_request("ab")] * 2)
    assert found.bit_equality is None and found.runs_bit_equal == 0


def test_the_tolerance_is_what_unchanged_runs_showed() -> None:
    runs = [_request("ab", "00", -1.0), _request("ab", "11", -1.25), _request("aX", "22", -0.75)]
    assert tolerance_of(runs) == Tolerance(0.5, 0.0, "A/A of 3 runs")
    assert tolerance_of([_request("a", "0", math.nan), _request("a", "1", -1.0)]).logprob == math.inf
    assert widest([Tolerance(0.5, 0.0), Tolerance(0.1, 0.2)], source="both") == Tolerance(0.5, 0.2, "both")
    with pytest.raises(ValueError, match="no tolerance"):
        widest([], source="none")


@given(st.lists(st.floats(-5, 0), min_size=2, max_size=5))
def test_unchanged_runs_lie_within_their_own_tolerance(logprobs: list[float]) -> None:
    runs = [_request("abc", str(number) * 3, value) for number, value in enumerate(logprobs)]
    tolerance = tolerance_of(runs)
    for left in runs:
        for right in runs:
            assert compare(left, right, tolerance=tolerance).same


@given(st.lists(request_records, min_size=2, max_size=4))
def test_counts_are_consistent_for_any_runs(runs: list[RequestRecord]) -> None:
    found = repeatability(runs)
    assert 1 <= found.unique_outputs <= found.repeats
    assert found.commonest + found.unique_outputs - 1 <= found.repeats
    assert found.positions_bit_equal <= found.positions_compared
    assert found.flips_in_step == len(found.second_spans) <= found.steps_in_step
    flat = [sum(output_of(run), ()) for run in runs]
    assert (found.flips_in_step == 0) == (len(set(flat)) == 1)


def test_one_run_repeats_nothing() -> None:
    with pytest.raises(ValueError, match="at least two"):
        repeatability([_request("a")])


def test_drift_is_measured_where_tokens_are_equal() -> None:
    left, right = _request("abc", "000", -1.0).generations[0], _request("aXc", "111", -1.5).generations[0]
    assert logprob_drift(left, right) == (0.5, None, 0.5)
