"""What stands in the prompt of each turn?  Context, question, and the tool calls that were already exchanged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.models.reference.prompt import render
from runtime.serve.boundary import Accepted
from runtime.serve.context import ContextPackage
from runtime.serve.envelope import CompletionTask
from runtime.serve.pinning import schema_digest, schema_text, support_schema
from runtime.serve.services import RouteBinding


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One tool call and its result, as the model wrote and reads them."""

    tool: str
    call: str
    result: str
    source: str | None
    """The citation that the result may be given as."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What the output of one generation is held to."""

    schema: dict[str, Any]
    digest: str

    @property
    def text(self) -> str:
        """The schema as the engine takes it."""
        return schema_text(self.schema)


def compact(document: Any) -> str:
    """Return JSON without spaces, in the given key order, as the model was trained to read it."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


def opening_prompt(accepted: Accepted, context: ContextPackage, binding: RouteBinding) -> tuple[int, ...]:
    """Return the tokens of the first turn's prompt."""
    return prompt_of(accepted, context, (), binding)


def prompt_of(
    accepted: Accepted, context: ContextPackage, turns: Sequence[Turn], binding: RouteBinding
) -> tuple[int, ...]:
    """Return the tokens of the prompt after these turns; every prompt is a prefix of the next one."""
    task = accepted.envelope.task
    if isinstance(task, CompletionTask):
        return task.prompt_tokens
    text = render(
        articles=[(piece.article, piece.text) for piece in context.pieces],
        account_records=[],
        question=task.question,
        turns=[(turn.call, turn.result) for turn in turns],
    )
    return tuple(binding.encode(text))


def provided_sources(context: ContextPackage, turns: Sequence[Turn]) -> tuple[str, ...]:
    """Return every source that an answer may cite."""
    return (*(piece.article for piece in context.pieces), *(turn.source for turn in turns if turn.source is not None))


def grammar_of(
    accepted: Accepted, context: ContextPackage, turns: Sequence[Turn], *, sources: tuple[str, ...] | None = None
) -> Grammar | None:
    """Return what this turn's output is held to, or None for free output.

    The last permitted turn has no tools left to propose; a repair allows only the provided `sources`.
    """
    if not accepted.is_support or context.pins.generation.grammar_digest is None:
        return None
    left = accepted.envelope.budget.max_tool_rounds - len(turns)
    pinned = frozenset(context.pins.tools.tools)
    schema = support_schema(pinned if left > 0 else frozenset(), sources)
    return Grammar(schema=schema, digest=schema_digest(schema))
