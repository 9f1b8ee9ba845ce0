"""Can a preparation be rebuilt to the bit here, and if not, which pin stands in the way?  Nothing is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from replay.environments import installed
from replay.plan import Level, Missing, Reach, hardware_differences
from replay.preparation_verdict import declared_unrepeatable
from replay.preparations import RecordedPreparation

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger


def assess_preparation(ledger: Ledger, recorded: RecordedPreparation) -> Reach:
    """Say what is not as it was, worst first; bitwise when nothing is in the way of nine equal stages."""
    missing = sorted(_missing(ledger, recorded), key=lambda one: one.allows)
    return Reach(level=min((one.allows for one in missing), default=Level.BITWISE), missing=tuple(missing))


def _missing(ledger: Ledger, recorded: RecordedPreparation) -> Iterator[Missing]:
    from runtime.prepare.sources import find_source
    from runtime.prepare.store import PackageStore
    from runtime.probe import probe

    if find_source(PackageStore(ledger.path), recorded.model_digest) is None:
        yield Missing(
            pin="artifact.model_digest",
            recorded=recorded.model_digest,
            here=None,
            allows=Level.EVIDENCE,
            fix="Name its folder: replay run PREPARATION --model FOLDER (or list folders in REPLAYLAB_MODELS).",
        )
    versions = {} if recorded.manifest is None else recorded.manifest.compiler.runtime_versions
    for name, before in versions.items():
        here = installed(name)
        if here != before:
            yield Missing(
                pin=f"compiler.runtime_versions.{name}",
                recorded=before,
                here=here,
                allows=Level.TOKEN,
                fix=f"Rebuild under it: --set compiler.{name}={before}, or install {name} {before}.",
            )
    if recorded.hardware is not None:
        known = {f"hardware.library_versions.{name}" for name in versions}
        yield from (one for one in hardware_differences(recorded.hardware, probe()) if one.pin not in known)
    declared = declared_unrepeatable(recorded)
    if declared is not None:
        yield Missing(
            pin="compiler.flags",
            recorded=f"declared not reproducible from {declared['from_stage']} on",
            here=declared["reason"],
            allows=Level.TOKEN,
        )
