"""Quality: exact answers, cited sources, exact tool arguments."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.quality import Answer, grade, parse_answer, report

ANSWER = Answer("Refunds take 5 days.", ("P-1", "P-2"))
CALL = Answer(tool="lookup_account", arguments={"account": "4821"})


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ('{"answer":"Refunds take 5 days.","sources":["P-1","P-2"]}', ANSWER),
        ('{"answer":"Yes."}', Answer("Yes.")),
        ('{"tool":"lookup_account","arguments":{"account":"4821"}}', CALL),
        ("not JSON", None),
        ("[1]", None),
        ('{"answer":1}', None),
        ('{"answer":"x","sources":[1]}', None),
        ('{"tool":"x","arguments":"y"}', None),
        ("[" * 100_000, None),
    ],
)
def test_reads_the_output_contract(output: str, answer: Answer | None) -> None:
    assert parse_answer(output) == answer


def test_grades_text_and_citations() -> None:
    assert grade(ANSWER, ANSWER).exact
    reordered = grade(Answer(" Refunds  take 5 days.", ("P-2", "P-1")), ANSWER)
    assert reordered.exact and reordered.text and reordered.sources
    partly = grade(Answer("Refunds take 5 days.", ("P-1", "P-9", "P-8")), ANSWER)
    assert (partly.exact, partly.text, partly.sources) == (False, True, False)
    assert (partly.citation_precision, partly.citation_recall) == (1 / 3, 1 / 2)
    uncited = grade(Answer("Refunds take 5 days."), ANSWER)
    assert (uncited.citation_precision, uncited.citation_recall) == (None, 0.0)
    assert grade(Answer("Yes."), Answer("Yes.")).citation_recall is None


def test_grades_tool_calls() -> None:
    assert grade(CALL, CALL).tool
    assert not grade(Answer(tool="lookup_account", arguments={"account": "4822"}), CALL).exact
    assert not grade(ANSWER, CALL).exact
    assert not grade(CALL, ANSWER).exact


def test_no_answer_is_wrong_and_says_so() -> None:
    for expected in (ANSWER, CALL, Answer("", ())):
        found = grade(None, expected)
        assert not found.exact and not found.parsed


def test_reports_rates_by_kind() -> None:
    found = report([grade(ANSWER, ANSWER), grade(CALL, CALL), grade(None, CALL)])
    assert (found.answers, found.exact.hits, found.parsed.hits) == (3, 2, 2)
    assert found.text is not None and (found.text.hits, found.text.of) == (1, 1)
    assert found.tool is not None and found.tool.share == 0.5
    assert found.tool.low < 0.5 < found.tool.high
    assert report([grade(CALL, CALL)]).sources is None
    with pytest.raises(ValueError, match="no answer"):
        report([])


answers = st.builds(Answer, st.text(max_size=5), st.lists(st.sampled_from("abc"), max_size=3).map(tuple))


@given(answers, answers)
def test_exact_means_everything_is_right(answer: Answer, expected: Answer) -> None:
    found = grade(answer, expected)
    assert grade(answer, answer).exact
    assert found.exact == (found.text and found.sources)
    if found.exact:
        assert found.citation_precision in (None, 1.0) and found.citation_recall in (None, 1.0)
