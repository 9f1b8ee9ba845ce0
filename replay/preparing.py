"""Can a package that a replay asks for, and nobody prepared, be prepared now?  For the shipped model it can."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manifests.compiler import CompilerManifest
from replay.errors import PinRefused
from replay.packages import Candidate
from replay.substitutes import Substitution
from traces.failures import ClassifiedError

FLAGS = "compiler.flags."


def prepare_missing(
    ledger: Path, *, model_digest: str, wanted: CompilerManifest, asked: Sequence[Substitution]
) -> Candidate | None:
    """Prepare the shipped reference model as asked; None when another model was recorded.

    Raises PinRefused when the backend refuses what was asked.
    """
    import runtime.models.reference as reference
    from runtime.backends.protocol import BuildOptions
    from runtime.models.loader import load_checkpoint
    from runtime.prepare.pipeline import prepare
    from runtime.prepare.store import PackageStore

    folder = Path(reference.__file__).parent
    try:
        if load_checkpoint(folder).digest != model_digest:
            return None
        named = [(one.pin.removeprefix(FLAGS), one.value) for one in asked if one.pin.startswith(FLAGS)]
        flags = {name.removeprefix("session."): value for name, value in named}
        norm = flags.pop("norm", wanted.flags.get("norm", "fused"))
        level = next((one.value for one in asked if one.pin == "compiler.optimization_level"), "default")
        options = BuildOptions(
            precision=wanted.precision,
            norm=norm,
            optimization=level,
            flags=flags,
            batch_invariant=wanted.batch_invariant,
        )
        prepared = prepare(folder, backend=wanted.backend, store=PackageStore(ledger), options=options)
    except ClassifiedError as error:
        raise PinRefused(error.message, pin=asked[0].pin, fix=error.fix) from error
    artifact = prepared.manifest.artifact.model_copy(update={"package_digest": prepared.digest})
    return Candidate(digest=prepared.digest, artifact=artifact, compiler=prepared.manifest.compiler)
