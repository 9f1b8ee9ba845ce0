"""How do two one-shot requests, or two runs of them, differ: in inputs, in how they ended, in outputs, in pins?"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from replay.catalog import Target
from replay.errors import UnknownRecording
from replay.inference_worker import first_difference
from replay.inferences import RecordedInference, RecordedInferences, load_inferences
from replay.plan import hardware_differences
from replay.preparation_comparison import compare_package_stages
from traces.failures import ClassifiedError

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger


def compare_inferences(ledger: Ledger, left: Target, right: Target) -> dict[str, Any]:
    """Return the differences of two requests, or of those requests of two runs that had the same inputs, as JSON.

    Of runs, the n-th request with some inputs is held against the n-th one with the same inputs.  Raises
    UnknownRecording when no inputs are the same: nothing can be held against anything.
    """
    one, other = load_inferences(ledger, left.run_id), load_inferences(ledger, right.run_id)
    if left.request_ref is not None and right.request_ref is not None:
        pairs = [(one.requests[left.request_ref], other.requests[right.request_ref])]
    else:
        pairs = _pairs(one, other)
    return {
        "left": {"run": one.run_id, "package": one.package, "requests": len(one.requests)},
        "right": {"run": other.run_id, "package": other.package, "requests": len(other.requests)},
        "pins": _pins(one, other),
        "preparation": compare_package_stages(ledger, one.package, other.package),
        "requests": [_compared(ledger, before, after) for before, after in pairs],
    }


def _pairs(one: RecordedInferences, other: RecordedInferences) -> list[tuple[RecordedInference, RecordedInference]]:
    """Pair requests of equal inputs, in order of arrival."""
    waiting: defaultdict[str, list[RecordedInference]] = defaultdict(list)
    for request in other.requests.values():
        if request.input_ref is not None:
            waiting[request.input_ref].append(request)
    pairs = [
        (request, waiting[request.input_ref].pop(0))
        for request in one.requests.values()
        if request.input_ref is not None and waiting[request.input_ref]
    ]
    if not pairs:
        raise UnknownRecording(
            "no one-shot request of the two runs had the same inputs",
            fix="Answer the same inputs again (replaylab infer), or compare two requests: replay list RUN shows them.",
        )
    return pairs


def _pins(one: RecordedInferences, other: RecordedInferences) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if one.package != other.package:
        found.append({"pin": "artifact.package_digest", "left": one.package, "right": other.package})
    if one.hardware is not None and other.hardware is not None:
        found += [
            {"pin": each.pin, "left": each.recorded, "right": each.here}
            for each in hardware_differences(one.hardware, other.hardware)
        ]
    return found


def _compared(ledger: Ledger, left: RecordedInference, right: RecordedInference) -> dict[str, Any]:
    """Hold one request against another: inputs, then how they ended, then outputs to the bit."""
    verdict, layer, detail, output = "diverged", None, "", first_difference(left.outputs, right.outputs)
    failed = [None if one.failure is None else str(one.failure.get("failure_class")) for one in (left, right)]
    if left.input_ref is None or right.input_ref is None:
        verdict, detail = "unverified", "the inputs of one of them were not kept"
    elif left.input_ref != right.input_ref:
        layer, detail = "input", "they were asked different things: the inputs differ"
    elif left.status != right.status or failed[0] != failed[1]:
        layer = "failure"
        detail = " against ".join(
            f"{one.status} ({why or 'no failure'})" for one, why in zip((left, right), failed, strict=True)
        )
    elif left.status != "ok":
        verdict, detail = "exact", f"both ended as {left.status} ({failed[0]}), without outputs"
    elif output is None:
        verdict, detail = "exact", f"every output is the same to the bit: {', '.join(left.outputs)}"
    else:
        layer, detail = "bits", f"output {output} differs" + _distance(ledger, left, right, output)
    return {
        "left": left.to_document(),
        "right": right.to_document(),
        "verdict": verdict,
        "layer": layer,
        "first_output": output if layer == "bits" else None,
        "detail": detail,
    }


def _distance(ledger: Ledger, left: RecordedInference, right: RecordedInference, output: str) -> str:
    """Say how far apart an output's values are; nothing where they were not kept or have other shapes."""
    import numpy as np
    from safetensors.numpy import load

    if left.result_ref is None or right.result_ref is None:
        return ""
    try:
        before, after = (load(ledger.read_blob(ref)).get(output) for ref in (left.result_ref, right.result_ref))
    except ClassifiedError:
        return ""
    if before is None or after is None or before.shape != after.shape:
        return ""
    return f", by {np.max(np.abs(before.astype(np.float64) - after)):.3g} at most"
