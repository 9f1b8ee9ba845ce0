"""What the comparison makes of its figures; the comparison itself is `python -m tests.bench.peers`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bench.peer import prompts_of
from tests.bench.peers import CASES, Absent, Peer, ratios, table


def test_a_seed_names_a_batch() -> None:
    assert prompts_of(batch=1, length=32, seed=0)[0][:5] == [2115, 956, 2156, 1862, 337]
    assert prompts_of(batch=8, length=32, seed=0) != prompts_of(batch=8, length=32, seed=1)


def test_a_ratio_is_the_median_over_turns_and_absent_engines_give_their_reason() -> None:
    figures = {
        "transformers": {case.name: [100.0, 200.0, 50.0] for case in CASES},
        "ours": {case.name: [200.0, 300.0, 200.0] for case in CASES},
    }
    answers = {"transformers": [7, 8], "ours": [7, 8]}
    found = {
        "figures": figures,
        "ratios": ratios(figures),
        "absent": {"other": "not installed: no wheel"},
        "answers": answers,
    }
    assert found["ratios"]["ours"]["decode 1"] == 2.0
    assert ratios({"ours": figures["ours"]}) == {}
    text = table(found)
    assert "200 (2.00)" in text
    assert text.splitlines()[-2].split() == ["other", "not", "installed:", "no", "wheel"]
    assert text.splitlines()[-1].startswith("all give the same tokens")
    answers["ours"] = [7, 9]
    assert table(found).splitlines()[-1] == "other tokens than transformers: ours"


def test_an_engine_that_cannot_start_is_absent_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(Absent, match=r"FileNotFoundError|OSError|HFValidationError|config"):
        Peer("transformers", tmp_path / "nowhere", tmp_path / "work", paths=[Path(sys.path[0])])
