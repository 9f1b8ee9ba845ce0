"""A verdict keeps the issue's JSON shape, and what ran under other pins is never called exact."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.verdict import ReplayVerdict, Verdict, exit_code, tally

KEYS = ["verdict", "layer", "stage", "step", "token_index", "pins_changed", "refused_pin", "original", "replay"]
CHANGE = {"pin": "generation.seed", "original": 1, "replay": 2}


def _verdict(word: str) -> ReplayVerdict:
    return ReplayVerdict(verdict=Verdict(word))


def test_the_json_form_has_the_promised_keys_and_reads_back() -> None:
    verdict = ReplayVerdict(verdict=Verdict.DIVERGED, layer="bits", stage="b06", step=3, token_index=0)
    document = verdict.to_document()
    assert list(document)[: len(KEYS)] == KEYS
    assert ReplayVerdict.from_document(document) == verdict


@given(word=st.sampled_from(list(Verdict)))
def test_a_changed_pin_is_never_exact(word: Verdict) -> None:
    changed = ReplayVerdict(verdict=word).under_changes([CHANGE])
    assert changed.verdict is not Verdict.EXACT
    assert changed.pins_changed == (CHANGE,)
    assert ReplayVerdict(verdict=word).under_changes([]).verdict is word


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["exact", "within_tolerance"], 0),
        (["exact", "diverged", "refused"], 1),
        (["exact", "refused"], 2),
        (["unverified", "exact"], 1),
        ([], 2),
    ],
)
def test_the_worst_verdict_decides_the_exit_code(words: list[str], code: int) -> None:
    assert exit_code([_verdict(word) for word in words]) == code


def test_tally_counts_in_order() -> None:
    words = ["diverged", "exact", "exact"]
    assert list(tally(_verdict(word) for word in words).items()) == [("exact", 2), ("diverged", 1)]
