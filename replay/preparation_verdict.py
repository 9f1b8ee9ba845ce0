"""What does a rebuild say, as one verdict?  Exact, or the first of nine stages that differs, or why it was refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from manifests.diff import diff_dimension
from manifests.hardware import HardwareManifest
from manifests.preparation import PreparationManifest
from replay.errors import PinRefused
from replay.plan import hardware_differences
from replay.preparation_pins import recorded_value
from replay.preparations import RecordedPreparation, RecordedStage
from replay.stage_comparison import StageComparison, compare_stage, first_difference
from replay.substitutes import Substitution, Way
from replay.verdict import ReplayVerdict, Verdict
from runtime.prepare.provenance import reproducible_of
from traces.stages import Stage

LAYER = "preparation"


def judge_rebuild(
    original: RecordedPreparation,
    compared: Sequence[StageComparison],
    prepared: PreparationManifest | None,
    choices: Sequence[Substitution],
    *,
    hardware: HardwareManifest,
    child: str,
    failed: RecordedStage | None = None,
    refusal: PinRefused | None = None,
) -> ReplayVerdict:
    """Return the verdict on a rebuild; what ran under changed pins is never called exact.

    Args:
        original: the recorded preparation.
        compared: the stages that were finished, each against the recorded one.
        prepared: what the rebuild gave; None where it failed or was stopped.
        choices: pins that the caller set.
        hardware: the machine of the rebuild.
        child: the run that recorded it.
        failed: the stage at which the rebuild failed.
        refusal: why nothing was built.
    """
    sides: dict[str, Any] = {"original": _side(original), "replay": {"run": child, "mode": "rebuild"}}
    if refusal is None and failed is not None and failed.failure is not None:
        refusal = _version_cannot(choices, failed)
    if refusal is not None:
        sides["replay"] |= {"status": "refused", "error_type": refusal.error_type, "fix": refusal.fix}
        return ReplayVerdict(verdict=Verdict.REFUSED, refused_pin=refusal.pin, detail=refusal.message, **sides)
    stages = [*compared, *_failed_stage(original, failed)]
    changes = pin_changes(original, prepared, choices, hardware)
    declared = declared_unrepeatable(original)
    sides["replay"] |= {"status": "ok" if failed is None else "failed", "stages": [one.to_document() for one in stages]}
    if failed is not None and failed.failure is not None:
        sides["replay"] |= {name: failed.failure.get(name) for name in ("failure_class", "error_type", "fix")}
    if declared is not None:
        sides["replay"]["declared"] = dict(declared)
    first = first_difference(stages)
    if first is None:
        verdict = ReplayVerdict(verdict=Verdict.EXACT, detail=_all_the_same(original, stages), **sides)
        return verdict.under_changes(changes)
    word, detail = Verdict.DIVERGED, _said(first, failed)
    if declared is not None and not choices and failed is None and _from(declared) <= first.stage.number:
        word = Verdict.UNVERIFIED
        detail = (
            f"declared not reproducible from {declared['from_stage']} on: {declared['reason']}; "
            "the stages before it are the same"
        )
    verdict = ReplayVerdict(verdict=word, layer=LAYER, stage=first.stage.value, detail=detail, **sides)
    suspects = tuple(str(change["pin"]) for change in changes) if word is Verdict.DIVERGED else ()
    return _with_suspects(verdict.under_changes(changes), suspects)


def pin_changes(
    original: RecordedPreparation,
    prepared: PreparationManifest | None,
    choices: Iterable[Substitution],
    hardware: HardwareManifest,
) -> tuple[dict[str, Any], ...]:
    """List every pin that is not as it was: those that were set, then those that follow or that this machine has."""
    chosen = tuple(choices)
    found = [
        {"pin": one.pin, "original": recorded_value(original, one.pin), "replay": one.value, "set": True}
        for one in chosen
    ]
    set_paths = {path for one in chosen for path in one.paths}
    if prepared is not None and original.manifest is not None:
        for name in ("artifact", "compiler"):
            for one in diff_dimension(name, getattr(original.manifest, name), getattr(prepared, name)):
                if one.path not in set_paths:
                    found.append({"pin": one.path, "original": one.left, "replay": one.right, "set": False})
    if original.hardware is not None:
        known = {str(change["pin"]) for change in found} | {f"hardware.library_versions.{path}" for path in set_paths}
        for missing in hardware_differences(original.hardware, hardware):
            if missing.pin not in known:
                change = {"pin": missing.pin, "original": missing.recorded, "replay": missing.here, "set": False}
                found.append(change)
    return tuple(found)


def _version_cannot(choices: Sequence[Substitution], failed: RecordedStage) -> PinRefused | None:
    """Refuse the version that was asked for when a rebuild under it breaks; None where no version was asked for."""
    asked = next((one for one in choices if one.way is Way.VERSION), None)
    if asked is None or failed.failure is None:
        return None
    reason = f"{asked.value} cannot run this: stage {failed.stage.value} {failed.stage.word}: "
    return PinRefused(reason + str(failed.failure["message"]), pin=asked.pin, fix="Choose a version nearer to ours.")


def declared_unrepeatable(original: RecordedPreparation) -> Mapping[str, Any] | None:
    """Return what the package itself says of its rebuild where it cannot be the same; None where it must be."""
    packaged = next((one for one in original.stages if one.stage is Stage.PACKAGE), None)
    if packaged is None:
        return None
    found = reproducible_of(packaged.record.get("build_provenance", {}))
    return found if found.get("reproducible") is False else None


def _from(declared: Mapping[str, Any]) -> int:
    return Stage(declared["from_stage"]).number


def _failed_stage(original: RecordedPreparation, failed: RecordedStage | None) -> list[StageComparison]:
    """Compare a failure with the recorded stage; who failed alike, in class and type, is the same."""
    if failed is None:
        return []
    before = next((one for one in original.stages if one.stage is failed.stage), None)
    compared = compare_stage(before, failed)
    if before is not None and before.failure is not None and failed.failure is not None:
        alike = all(before.failure.get(name) == failed.failure.get(name) for name in ("failure_class", "error_type"))
        if alike:
            compared = StageComparison(stage=failed.stage, same=True, left_us=before.duration_us)
    return [compared]


def _all_the_same(original: RecordedPreparation, stages: Sequence[StageComparison]) -> str:
    failed = original.failed
    if failed is not None and failed.failure is not None:
        return f"it fails alike at stage {failed.stage.value} {failed.stage.word}: {failed.failure['failure_class']}"
    return f"all {len(stages)} stages are the same to the bit"


def _said(first: StageComparison, failed: RecordedStage | None) -> str:
    where = f"stage {first.stage.value} {first.stage.word}"
    if failed is not None and failed.stage is first.stage and failed.failure is not None:
        return f"{where} fails now: {failed.failure['message']}"
    if first.left_digest is None:
        return f"{where} failed when it was recorded and passes now"
    names = [one["field"] for one in first.fields]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{where} is the first that differs: {', '.join(names[:3]) or 'its digest'}{more}"


def _side(original: RecordedPreparation) -> dict[str, Any]:
    failed = original.failed
    return {
        "run": original.run_id,
        "request": None,
        "mode": "preparation",
        "status": "ok" if failed is None else "failed",
        "failure_class": None if failed is None or failed.failure is None else failed.failure["failure_class"],
        "package": original.package,
    }


def _with_suspects(verdict: ReplayVerdict, suspects: tuple[str, ...]) -> ReplayVerdict:
    return ReplayVerdict.from_document({**verdict.to_document(), "suspects": suspects})
