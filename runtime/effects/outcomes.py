"""What became of an effect, as a document: a result, or a classified error that a replay raises again."""

from __future__ import annotations

import inspect
import json
from typing import Any

from manifests.canonical import canonical_bytes
from runtime.effects.door import Action, EffectKind
from runtime.errors import AmbiguousSideEffect, ProviderFailed, RequestCancelled
from traces.failures import ClassifiedError, FailureClass


async def outcome_of(kind: EffectKind, action: Action, *, write: bool) -> dict[str, Any]:
    """Run an action to its outcome document; what it raises becomes part of the record, cancellation excepted."""
    try:
        result = action()
        settled = await result if inspect.isawaitable(result) else result
        # through the canonical form, so that a live run sees exactly what a replay will see
        return {"result": json.loads(canonical_bytes(settled))}
    except ClassifiedError as error:
        return {"error": describe_error(error)}
    except Exception as error:  # an adapter's own fault: contained here, classified, recorded
        return {"error": ambiguous_write(kind, type(error).__name__) if write else unexpected_failure(kind, error)}


def answer_of(outcome: dict[str, Any]) -> Any:
    """Return an outcome's result, or raise its error, classified as it was."""
    error = outcome.get("error")
    if error is None:
        return outcome["result"]
    raise ClassifiedError(
        error["message"],
        failure_class=FailureClass(error["failure_class"]),
        evidence=error["evidence"],
        fix=error["fix"],
        error_type=error["error_type"],
    )


def describe_error(error: ClassifiedError) -> dict[str, Any]:
    """Return what a replay needs to raise the error again."""
    return {
        "failure_class": error.failure_class.value,
        "error_type": error.error_type,
        "message": error.message,
        "evidence": dict(error.evidence),
        "fix": error.fix,
        "ambiguous": isinstance(error, AmbiguousSideEffect),
    }


def ambiguous_write(kind: EffectKind, cause: str) -> dict[str, Any]:
    """Describe a write that began and whose end is unknown."""
    return describe_error(
        AmbiguousSideEffect(
            f"A {kind} write was started and its end is unknown ({cause}).",
            reason="ambiguous_side_effect",
            evidence={"kind": kind, "cause": cause, "side_effect_status": "ambiguous"},
            fix="Read the external state by the idempotency key before any retry.",
        )
    )


def cancelled_call(kind: EffectKind) -> dict[str, Any]:
    """Describe a call whose caller went away."""
    return describe_error(
        RequestCancelled(
            f"The request was cancelled during a {kind} call.", reason="cancelled", evidence={"kind": kind}
        )
    )


def unexpected_failure(kind: EffectKind, error: Exception) -> dict[str, Any]:
    """Describe an adapter's own fault by its type; its text may hold anything and is not kept."""
    return describe_error(
        ProviderFailed(
            f"The {kind} adapter failed unexpectedly ({type(error).__name__}).",
            reason=f"{kind}_adapter_failed",
            evidence={"kind": kind, "exception": type(error).__name__},
            fix="This is a fault of the adapter, not of the request; see the evidence.",
        )
    )
