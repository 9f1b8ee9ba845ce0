"""What the comparison makes of its figures; the comparison itself is `python -m tests.bench.peers`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.installs import INSTALLS, Absent, install, reason
from tests.bench.llama import interleaved
from tests.bench.peer import KINDS, prompts_of
from tests.bench.peers import CASES, Case, Peer, judged, ratios, table, take_turns


def found(answers: dict[str, list[list[int]]], **figures: list[float]) -> dict[str, Any]:
    """A comparison of such figures in every case."""
    named = {kind.replace("_", "-"): {case.name: speeds for case in CASES} for kind, speeds in figures.items()}
    return {"figures": named, "ratios": ratios(named), "absent": {"other": "no wheel"}, "answers": answers}


def test_a_seed_names_a_batch() -> None:
    assert prompts_of(batch=1, length=32, seed=0)[0][:5] == [2115, 956, 2156, 1862, 337]
    assert prompts_of(batch=8, length=32, seed=0) != prompts_of(batch=8, length=32, seed=1)


def test_a_ratio_is_the_median_over_turns_to_each_reference() -> None:
    document = found(
        {}, transformers=[100.0, 200.0, 50.0], onnxruntime_genai=[400.0, 300.0, 100.0], ours=[200.0, 300.0, 200.0]
    )
    assert document["ratios"]["transformers"]["ours"]["decode 1"] == 2.0
    assert document["ratios"]["onnxruntime-genai"]["ours"]["decode 1"] == 1.0
    row = next(line for line in table(document).splitlines() if line.startswith("ours"))
    assert row.split()[1:4] == ["200", "2.00", "1.00"]


def test_an_absent_engine_gives_its_reason_and_no_ratio() -> None:
    document = found({}, transformers=[100.0], ours=[200.0])
    assert set(document["ratios"]) == {"transformers"}
    lines = table(document).splitlines()
    assert next(line for line in lines if line.startswith("ours")).split()[1:4] == ["200", "2.00", "-"]
    assert next(line for line in lines if line.startswith("other")).split() == ["other", "no", "wheel"]


def test_every_prompt_whose_tokens_differ_is_told() -> None:
    same, parted = [[7, 8, 9], [1, 2, 3]], [[7, 8, 9], [1, 5, 3]]
    assert judged({"ours": same}) == ["greedy tokens not compared: no transformers"]
    assert judged({"transformers": same, "ours": same, "other": parted}) == [
        "greedy tokens equal to transformers (2 prompts, 3 tokens each): ours",
        "greedy tokens of other: 1 of 2 prompts differ, from token [1]",
    ]


def test_an_engine_that_cannot_start_is_absent_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(Absent, match=r"FileNotFoundError|OSError|HFValidationError|config"):
        Peer("transformers", tmp_path / "nowhere", tmp_path / "work", paths=[Path(sys.path[0])])


def test_an_engine_that_fails_between_turns_leaves_the_others_alone() -> None:
    class Fails:
        def __init__(self, at: str) -> None:
            self._at = at

        def measure(self, case: Case, seed: int) -> float:
            if case.name == self._at and seed == 2:
                raise Absent("its process ended")
            return 1.0

    absent: dict[str, str] = {}
    peers: Any = {"steady": Fails("never"), "weak": Fails("decode 8")}
    figures = take_turns(peers, absent, repetitions=2)
    assert figures == {"steady": {case.name: [1.0, 1.0] for case in CASES}}
    assert absent == {"weak": "failed at decode 8: its process ended"}


def test_every_peer_that_is_installed_is_one_that_is_driven_at_one_version() -> None:
    assert set(INSTALLS) < set(KINDS)
    for kind, wanted in INSTALLS.items():
        assert all("==" in requirement for requirement in wanted.requirements)
        assert wanted.requirements[0].startswith(f"{kind}==")


def test_what_is_not_to_be_had_is_absent_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(Absent, match=r"not installed: .*No matching distribution found for onnxruntime-genai"):
        install("onnxruntime-genai", tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Absent, match=r"no C compiler here \(looked for cc, gcc, clang\)"):
        install("llama-cpp-python", tmp_path / "cache")
    assert install("transformers", tmp_path / "cache") == []
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())


def test_a_failed_build_is_told_by_its_first_error() -> None:
    output = """
  error: subprocess-exited-with-error
  Building wheel for llama-cpp-python (pyproject.toml) did not run successfully.
      vendor/x.cpp:3:10: fatal error: missing.h: No such file or directory
ERROR: Could not build wheels for llama-cpp-python
"""
    assert reason(output) == "vendor/x.cpp:3:10: fatal error: missing.h: No such file or directory"
    cmake = "  *** Configuring\n  CMake Error at Test.cmake:63 (message):\n    The compiler is broken.\n  more"
    assert reason(cmake) == "CMake Error at Test.cmake:63 (message): The compiler is broken."
    assert reason("ERROR: No matching distribution found for x==1") == "ERROR: No matching distribution found for x==1"
    assert reason("") == "pip gave no reason"


@given(heads=st.integers(1, 4), pairs=st.integers(1, 8), position=st.integers(0, 2048), seed=st.integers(0, 2**32 - 1))
def test_reordered_rows_rotate_in_neighbours_as_they_did_in_halves(
    heads: int, pairs: int, position: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    weights, row = draw.standard_normal((heads * 2 * pairs, 3)), draw.standard_normal(3)
    angles = position * 10_000.0 ** (-np.arange(pairs) / pairs)
    turn = np.exp(1j * angles)
    halves = (weights @ row).reshape(heads, 2, pairs)
    expected = (halves[:, 0] + 1j * halves[:, 1]) * turn
    neighbours = (interleaved(weights, heads) @ row).reshape(heads, pairs, 2)
    np.testing.assert_allclose((neighbours[..., 0] + 1j * neighbours[..., 1]) * turn, expected)
