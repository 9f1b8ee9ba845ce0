"""How is a support question laid out for the reference model, and which answers may it give?

The layout keeps every prompt a prefix of the prompt of its next turn, so that a prefix cache can reuse
the first turn's blocks when the tool result arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PAD = "<|pad|>"
BEGIN = "<|begin|>"
END = "<|end|>"
POLICY = "<|policy|>"
ACCOUNT = "<|account|>"
USER = "<|user|>"
TOOL = "<|tool|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (PAD, BEGIN, END, POLICY, ACCOUNT, USER, TOOL, ASSISTANT)

TICKET_TOPICS = ("refund", "repair", "delivery", "warranty", "exchange", "billing", "cancellation", "complaint")
MAX_ANSWER_CHARACTERS = 160


def plain(text: str) -> str:
    """Return text in which no special token can be spelled, so that a customer cannot open a role of their own."""
    return text.replace("<|", "< |")


def cited(text: str, source: str) -> str:
    """Return an article as an answer would cite it: text and identifier stand as near to one another as they will."""
    return f'{text}","sources":["{source}"]}}'


def render(
    *,
    articles: Sequence[tuple[str, str]],
    account_records: Sequence[str],
    question: str,
    turns: Sequence[tuple[str, str]] = (),
) -> str:
    """Lay out one prompt as text; the tokenizer turns the role markers into special tokens.

    articles: (id, text) pairs, best first or in any order, up to four as trained. account_records: each the
    compact JSON of a known account (`task.account_record`). turns: (tool call JSON, tool result JSON) pairs that
    were already exchanged. The prompt ends where the model is to continue; its output ends with END.
    """
    parts = [BEGIN]
    parts += [POLICY + plain(cited(text, identity)) for identity, text in articles]
    parts += [f"{ACCOUNT}{plain(record)}" for record in account_records]
    parts += [USER, plain(question), ASSISTANT]
    for call, result in turns:
        parts += [plain(call), END, TOOL, plain(result), ASSISTANT]
    return "".join(parts)


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def output_schema() -> dict[str, Any]:
    """Return the JSON schema of every output: one of two tool calls, or an answer with its sources.

    The order of properties is the order of the compact JSON that the model was trained to write.
    """
    account = {"type": "string", "pattern": "^[0-9]{4}$"}
    source = {"type": "string", "pattern": "^[PAT]-[0-9]{4}$"}
    lookup = _closed({"tool": {"const": "lookup_account"}, "arguments": _closed({"account": account})})
    topic = {"type": "string", "enum": list(TICKET_TOPICS)}
    ticket = _closed({"tool": {"const": "create_ticket"}, "arguments": _closed({"account": account, "topic": topic})})
    answer = _closed(
        {
            "answer": {"type": "string", "minLength": 1, "maxLength": MAX_ANSWER_CHARACTERS},
            "sources": {"type": "array", "items": source, "minItems": 1, "maxItems": 2},
        }
    )
    return {"anyOf": [lookup, ticket, answer]}
