"""Was the answer right?  Exact match, cited sources and tool arguments against what was expected."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from eval.statistics import wilson


@dataclass(frozen=True)
class Answer:
    """What a model said, or should have said: a final text with its sources, or a tool call."""

    text: str | None = None
    sources: tuple[str, ...] = ()
    tool: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Grade:
    """How one answer compares with what was expected."""

    exact: bool
    """Text and set of sources, or tool and arguments, are as expected."""
    text: bool | None
    """Equal text up to white space; None where a tool call was expected."""
    sources: bool | None
    """Equal sets of sources; None where a tool call was expected."""
    citation_precision: float | None
    """Share of the cited sources that were expected; None where nothing was cited."""
    citation_recall: float | None
    """Share of the expected sources that were cited; None where none was expected."""
    tool: bool | None
    """Equal tool and arguments; None where a text was expected."""
    parsed: bool
    """Whether the output was an answer at all."""


@dataclass(frozen=True)
class Rate:
    """A share with its Wilson interval at 95 %."""

    hits: int
    of: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Return hits / of."""
        return self.hits / self.of


@dataclass(frozen=True)
class QualityReport:
    """Rates over many answers; None where no answer of the kind was expected."""

    answers: int
    parsed: Rate
    exact: Rate
    text: Rate | None
    sources: Rate | None
    tool: Rate | None


def parse_answer(output: str) -> Answer | None:
    """Read the output contract's JSON (answer and sources, or tool and arguments); None for anything else."""
    try:
        loaded: Any = json.loads(output)
    except (ValueError, RecursionError):
        return None
    if not isinstance(loaded, dict):
        return None
    document = cast("dict[str, Any]", loaded)
    tool, arguments = document.get("tool"), document.get("arguments")
    if isinstance(tool, str) and isinstance(arguments, dict):
        return Answer(tool=tool, arguments=cast("dict[str, Any]", arguments))
    text, sources = document.get("answer"), document.get("sources", [])
    if isinstance(text, str) and isinstance(sources, list):
        named = cast("list[Any]", sources)
        if all(isinstance(source, str) for source in named):
            return Answer(text, tuple(named))
    return None


def grade(answer: Answer | None, expected: Answer) -> Grade:
    """Compare one answer with the expected one; None stands for an output that was no answer."""
    said = answer or Answer()
    if expected.tool is not None:
        right = (said.tool, dict(said.arguments)) == (expected.tool, dict(expected.arguments))
        return Grade(right, None, None, None, None, right, answer is not None)
    text = said.text is not None and said.text.split() == (expected.text or "").split()
    cited, wanted = frozenset(said.sources), frozenset(expected.sources)
    sources = said.text is not None and cited == wanted
    both = len(cited & wanted)
    precision = both / len(cited) if cited else None
    recall = both / len(wanted) if wanted else None
    return Grade(text and sources, text, sources, precision, recall, None, answer is not None)


def report(grades: Sequence[Grade]) -> QualityReport:
    """Sum up grades.

    Raises:
        ValueError: there is none; no answers have no accuracy.
    """
    if not grades:
        raise ValueError("there is no answer to report on")
    return QualityReport(
        answers=len(grades),
        parsed=_rate([item.parsed for item in grades]),
        exact=_rate([item.exact for item in grades]),
        text=_rate_of([item.text for item in grades]),
        sources=_rate_of([item.sources for item in grades]),
        tool=_rate_of([item.tool for item in grades]),
    )


def _rate_of(marks: Sequence[bool | None]) -> Rate | None:
    known = [mark for mark in marks if mark is not None]
    return _rate(known) if known else None


def _rate(marks: Sequence[bool]) -> Rate:
    low, high = wilson(sum(marks), len(marks))
    return Rate(sum(marks), len(marks), low, high)
