"""Stage 2. What may the model read for this request?

Finds the tenant's articles by full text, masks secrets, drops repeats, keeps the best within the token budget, and
records where each piece came from. Retrieved text is marked untrusted: it is data, and can open no role of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from manifests.canonical import digest
from manifests.run import Pins
from runtime.errors import OutputRejected, RouteUnavailable
from runtime.serve import masking
from runtime.serve.boundary import Accepted
from runtime.serve.envelope import SupportTask
from runtime.serve.pinning import candidate_route, record_pins
from runtime.serve.services import Services
from runtime.serve.stage import Emitted, RequestTrace
from traces.stages import Stage

MOST_TERMS = 24
_STOP_WORDS = (
    "a an and are at can do does for from get have hello hi how i in is it me morning much my of on or please tell the"
    " there this to until what when which with you your good question help account"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One article as it reaches the prompt."""

    article: str
    text: str
    text_digest: str
    rank: int
    masked: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextPackage:
    """The bounded context and the pins that now know it."""

    pieces: tuple[Piece, ...]
    tokens: int
    context_digest: str
    pins: Pins
    document: dict[str, Any]


def query_of(question: str) -> str:
    """Return the full-text query: the question's words as quoted terms, joined by OR; empty when none is left.

    Every term is a quoted string of letters and digits, so no part of a question can be query syntax.
    """
    words = re.findall(r"[^\W_]+", question.lower())
    stop_words = _STOP_WORDS.split()
    terms = dict.fromkeys(word for word in words if word not in stop_words and len(word) < 40)
    return " OR ".join(f'"{term}"' for term in list(terms)[:MOST_TERMS])


async def assemble(trace: RequestTrace, services: Services, accepted: Accepted) -> ContextPackage:
    """Assemble the context; raises OutputRejected on a foreign row, RouteUnavailable on another index than pinned."""
    assembled: list[ContextPackage] = []
    task = accepted.envelope.task
    received: dict[str, Any] = {
        "task": digest(task.model_dump(mode="json")),
        "settings": accepted.pins.context.to_document(),
        "tenant": accepted.tenant,
    }

    async def work() -> Emitted:
        query = query_of(task.question) if isinstance(task, SupportTask) else ""
        rows = await _retrieve(services, accepted, query) if query else []
        pieces, dropped, tokens = _select(services, accepted, rows)
        document = _document(accepted, query, pieces, dropped, tokens)
        context_digest = digest(document)
        sources = {piece.article: piece.text_digest for piece in pieces}
        observed = {"context_digest": context_digest, "source_snapshots": sources}
        context_pins = type(accepted.pins.context).from_document(accepted.pins.context.to_document() | observed)
        pins = accepted.pins.replace(context=context_pins)
        assembled.append(
            ContextPackage(pieces=pieces, tokens=tokens, context_digest=context_digest, pins=pins, document=document)
        )
        return Emitted(document=document, record=_record(accepted, pieces, context_digest))

    await trace.stage(Stage.CONTEXT, received, work)
    if assembled[0].pins != accepted.pins:
        record_pins(trace, assembled[0].pins, services)
    return assembled[0]


async def _retrieve(services: Services, accepted: Accepted, query: str) -> list[dict[str, Any]]:
    pinned = accepted.pins.context
    if pinned.index_digest is None:
        return []
    limit = 2 * _most_articles(accepted)
    if limit == 0:
        return []
    found = await services.effects.perform(
        "retrieval",
        {
            "index": pinned.index_digest,
            "ranking": pinned.ranking,
            "tenant": accepted.tenant,
            "query": query,
            "limit": limit,
        },
        lambda: services.world.search(accepted.tenant, query, limit),
        side_effect="read",
    )
    if found["index"] != pinned.index_digest:
        raise RouteUnavailable(
            "The article index is another one than the request is pinned to.",
            reason="index_mismatch",
            evidence={"artifact_digest": found["index"], "validation_output": f"pinned {pinned.index_digest}"},
            fix="Give the pinned index, or set context.index_digest to the one that is deployed.",
        )
    rows: list[dict[str, Any]] = found["rows"]
    if any(row["tenant"] != accepted.tenant for row in rows):
        raise OutputRejected(
            "Retrieval returned a row of another tenant.",
            reason="tenant_isolation",
            evidence={"failed_rule": "retrieval_tenant", "disposition": "rejected"},
            fix="The index or its filter is damaged: rebuild it and check the deployment.",
        )
    return rows


def _most_articles(accepted: Accepted) -> int:
    return int(accepted.pins.context.filters.get("max_articles", str(accepted.envelope.context.max_articles)))


def _select(
    services: Services, accepted: Accepted, rows: list[dict[str, Any]]
) -> tuple[tuple[Piece, ...], list[dict[str, str]], int]:
    """Keep the best pieces that fit; returns them, what was dropped and why, and their tokens."""
    binding = candidate_route(accepted.envelope, services)
    budget = accepted.pins.context.token_budget
    most = _most_articles(accepted)
    kept: list[Piece] = []
    dropped: list[dict[str, str]] = []
    seen: set[str] = set()
    tokens = 0
    for row in rows:
        text, masked = masking.mask(masking.normalize(row["text"]))
        size = 0 if binding is None else len(binding.encode(text))
        likeness = " ".join(text.lower().split())
        reason = None
        if likeness in seen:
            reason = "duplicate"
        elif len(kept) >= most:
            reason = "rank"
        elif tokens + size > budget:
            reason = "token_budget"
        if reason is not None:
            dropped.append({"article": row["article"], "reason": reason})
            continue
        seen.add(likeness)
        tokens += size
        kept.append(
            Piece(article=row["article"], text=text, text_digest=digest(text.encode()), rank=row["rank"], masked=masked)
        )
    return tuple(kept), dropped, tokens


def _document(
    accepted: Accepted, query: str, pieces: tuple[Piece, ...], dropped: list[dict[str, str]], tokens: int
) -> dict[str, Any]:
    return {
        "tenant": accepted.tenant,
        "query": query,
        "index": accepted.pins.context.index_digest,
        "articles": [
            {
                "article": piece.article,
                "text": piece.text,
                "digest": piece.text_digest,
                "rank": piece.rank,
                "classification": "tenant",
                "trust": "untrusted",
                "masked": list(piece.masked),
            }
            for piece in pieces
        ],
        "dropped": dropped,
        "tokens": tokens,
    }


def _record(accepted: Accepted, pieces: tuple[Piece, ...], context_digest: str) -> dict[str, Any]:
    return {
        "sources": [{"article": piece.article, "digest": piece.text_digest} for piece in pieces],
        "classifications": {"tenant": len(pieces)},
        "freshness": {"index": accepted.pins.context.index_digest},
        "redaction_status": "masked" if any(piece.masked for piece in pieces) else "clean",
        "token_budget": accepted.pins.context.token_budget,
        "context_digest": context_digest,
    }
