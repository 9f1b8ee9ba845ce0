"""What does the comparison of a replay with its recording mean, as one verdict?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.attribution import attribute
from eval.divergence import Divergence, compare
from eval.failures import compare_failures
from eval.layers import LAYERS
from eval.records import RequestRecord
from manifests.canonical import digest
from manifests.diff import PinDifference
from replay.jobs import ReplayMode
from replay.verdict import ReplayVerdict, Verdict
from traces.stages import Stage

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
    differences: Sequence[PinDifference] = (),
    rescheduled: bool = False,
) -> ReplayVerdict:
    """Compare the two and return the verdict; what ran under changed pins is never called exact.

    Args:
        changes: pins that changed, as the verdict shows them.
        differences: the same pins, to name those that can explain what was found.
        rescheduled: whether scheduling rules are among them, so that the schedule is judged too.
    """
    layers = judged_layers(mode, rescheduled=rescheduled)
    found = compare(original, replay, layers=layers)
    verdict = ReplayVerdict(
        verdict=Verdict(found.verdict),
        layer=found.layer,
        stage=found.stage,
        step=found.step,
        token_index=found.request_token_index,
        original=_side(original, mode="live"),
        replay=_side(replay, mode=mode) | _extent(found) | _failures(original, replay),
        detail=sentence(found, mode=mode),
        suspects=suspects(found, differences),
    )
    return verdict.under_changes(changes)


def suspects(found: Divergence, differences: Sequence[PinDifference]) -> tuple[str, ...]:
    """Name the changed pins that act on the layer that differs first; none where nothing differs."""
    if found.verdict != "diverged":
        return ()
    return tuple(one.pin.path for one in attribute(differences, found).suspects if one.role == "direct")


def sentence(found: Divergence, *, mode: ReplayMode) -> str:
    """Say in one sentence what was found."""
    if found.verdict == "exact":
        if mode == "audit":
            return "context, tools, decisions and failure class are the same; no model was run"
        return "every layer is the same to the bit"
    if found.verdict == "unverified":
        return "nothing differs, but not everything could be compared: " + "; ".join(found.unverified)
    said = f"{_what(found)} ({_where(found)})"
    if found.layer in ("schedule", "bits", "margin") and found.counts:
        first = found.first_token_index
        said += "; all tokens are the same" if first is None else f"; tokens differ from {first} on"
    return said


def _what(found: Divergence) -> str:
    """Say what differs; digests tell nothing to a reader, values do."""
    what = str(found.detail.get("what", found.layer))
    expected, actual = found.detail.get("expected"), found.detail.get("actual")
    known = {
        "logits_digest": "the logits have other bits",
        "schedule_digest": "the rows ran in another schedule",
        "prompt_digest": "the model was given another prompt",
        "response_digest": "the response is another one",
    }
    if what in known:
        return known[what]
    if what == "output_digest":
        word = Stage(found.stage).word if found.stage else "a"
        return f"the {word} stage gave another result"
    if what == "policy":
        return f"a policy decision was {_decision(expected)}, is {_decision(actual)}"
    if what.endswith("_digest"):
        return f"{what.removesuffix('_digest').replace('_', ' ')} differs"
    return f"{what.replace('_', ' ')} was {_brief(expected)}, is {_brief(actual)}"


def _where(found: Divergence) -> str:
    parts = [Stage(found.stage).word] if found.stage else []
    if found.generation:
        parts.append(f"generation {found.generation + 1}")
    if found.token_index is not None:
        parts.append(f"token {found.token_index}")
    if found.step is not None:
        parts.append(f"engine step {found.step}")
    return ", ".join(parts) or "whole request"


def _decision(value: Any) -> str:
    if not isinstance(value, Mapping):
        return "nothing"
    return f"{value.get('name')}: {value.get('decision')} under {value.get('version')}"


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


def _failures(original: RequestRecord, replay: RequestRecord) -> dict[str, Any]:
    """Return whether both failed alike, and what their class demands and the replay lacks; nothing if neither did."""
    if original.failure is None and replay.failure is None:
        return {}
    found = compare_failures(original, replay)
    document = {
        "same_class": found.same_class,
        "same_stage": found.same_stage,
        "same_retry_decision": found.same_retry_decision,
        "missing_evidence": list(found.missing_replay),
        "broken_containment": list(found.broken_replay),
    }
    return {"failure": document}


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
