"""What does the comparison of a replay with its recording mean, as one verdict?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.divergence import Divergence, compare
from eval.layers import LAYERS
from eval.records import RequestRecord
from manifests.canonical import digest
from replay.jobs import ReplayMode
from replay.verdict import ReplayVerdict, Verdict

AUDITED = frozenset({"input", "tool", "decision", "failure"})
"""Layers that an audit judges: it runs no model."""


def judged_layers(mode: ReplayMode, *, rescheduled: bool) -> frozenset[str]:
    """Return the layers that a mode can judge; who runs alone has another schedule on purpose."""
    if mode == "audit":
        return AUDITED
    if mode == "alone" and not rescheduled:
        return frozenset(LAYERS) - {"schedule"}
    return frozenset(LAYERS)


def judge(
    original: RequestRecord,
    replay: RequestRecord,
    *,
    mode: ReplayMode,
    changes: Sequence[Mapping[str, Any]] = (),
    rescheduled: bool = False,
) -> ReplayVerdict:
    """Compare the two and return the verdict; what ran under changed pins is never called exact."""
    layers = judged_layers(mode, rescheduled=rescheduled)
    found = compare(original, replay, layers=layers)
    verdict = ReplayVerdict(
        verdict=Verdict(found.verdict),
        layer=found.layer,
        stage=found.stage,
        step=found.step,
        token_index=found.request_token_index,
        original=_side(original, mode="live"),
        replay=_side(replay, mode=mode) | _extent(found),
        detail=sentence(found, mode=mode),
    )
    return verdict.under_changes(changes)


def sentence(found: Divergence, *, mode: ReplayMode) -> str:
    """Say in one sentence what was found."""
    if found.verdict == "exact":
        if mode == "audit":
            return "context, tools, decisions and failure class are the same; no model was run"
        return "every layer is the same to the bit"
    if found.verdict == "unverified":
        return "nothing differs, but not everything could be compared: " + "; ".join(found.unverified)
    place = f"in {_where(found)}" if _where(found) else ""
    what = str(found.detail.get("what", found.layer))
    expected, actual = _brief(found.detail.get("expected")), _brief(found.detail.get("actual"))
    said = f"{found.layer} first differ {place}: {what} was {expected}, is {actual}".replace("  ", " ")
    if found.layer in ("schedule", "bits", "margin") and found.first_token_index is None and found.counts:
        said += "; all tokens are the same"
    elif found.layer != "token" and found.first_token_index is not None:
        said += f"; the first token differs at {found.first_token_index}"
    return said


def _where(found: Divergence) -> str:
    parts = [found.stage or ""]
    if found.generation:
        parts.append(f"generation {found.generation + 1}")
    if found.token_index is not None:
        parts.append(f"token {found.token_index}")
    if found.step is not None:
        parts.append(f"engine step {found.step}")
    return ", ".join(part for part in parts if part)


def _brief(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _side(record: RequestRecord, *, mode: str) -> dict[str, Any]:
    """Return what the verdict shows of one side; digests stand for text, so that no content leaks into reports."""
    tokens = [[token.token for token in generation.tokens] for generation in record.generations]
    bits = [[token.logits_digest for token in generation.tokens] for generation in record.generations]
    failure = record.failure
    return {
        "run": record.run_id,
        "request": record.request_ref,
        "mode": mode,
        "status": record.terminal_status,
        "failure_class": None if failure is None else failure.failure_class,
        "generations": len(record.generations),
        "tokens": record.token_count,
        "tokens_digest": digest(tokens),
        "bits_digest": digest(bits),
        "response_digest": record.response_digest,
        "manifest_digest": record.manifest_digest,
    }


def _extent(found: Divergence) -> dict[str, Any]:
    """Return how far the replay parted, past the first difference too."""
    return {
        "first_bit_index": found.first_bit_index,
        "first_token_index": found.first_token_index,
        "tokens_different": found.tokens_different,
        "bits_different": sum(count.bits_different for count in found.counts),
        "stages_different": list(found.stages_different),
        "unverified": list(found.unverified),
    }
