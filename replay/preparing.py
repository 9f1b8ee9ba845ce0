"""Can a package that a replay asks for, and nobody prepared, be prepared now?  Where the model is at hand it can."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manifests.compiler import CompilerManifest
from replay.errors import PinRefused
from replay.packages import Candidate
from replay.preparation_pins import change_options
from replay.substitutes import VERSIONED, Substitution, Way
from traces.failures import ClassifiedError


def prepare_missing(
    ledger: Path,
    *,
    base: Candidate | None,
    model_digest: str,
    wanted: CompilerManifest,
    asked: Sequence[Substitution],
) -> Candidate | None:
    """Prepare the recorded model as the recorded package was, with what is asked for changed; None without the model.

    Args:
        ledger: takes the package into its store, and knows where models were prepared from.
        base: the recorded package; None where it is gone, and the backend's own choices stand in.
        model_digest: of the recorded model.
        wanted: the compiler pins with the changes in them.
        asked: the changes.
    Raises PinRefused when the backend refuses what was asked, or is not made of a library that was asked for.
    """
    from runtime.backends.protocol import BuildOptions
    from runtime.prepare.capture import read_options
    from runtime.prepare.pipeline import prepare
    from runtime.prepare.sources import find_source
    from runtime.prepare.store import PackageStore

    _check_libraries(wanted.backend, asked)
    store = PackageStore(ledger)
    folder = find_source(store, model_digest)
    if folder is None:
        return None
    recorded = base is not None and bool(base.options)
    before = read_options(base.options) if base is not None and recorded else BuildOptions(precision=wanted.precision)
    backend, options = change_options(base.compiler.backend if base is not None else wanted.backend, before, asked)
    try:
        prepared = prepare(folder, backend=backend, store=store, options=options)
    except ClassifiedError as error:
        blamed = next((one for one in asked if one.way is Way.VERSION), asked[0])
        raise PinRefused(error.message, pin=blamed.pin, fix=error.fix) from error
    artifact = prepared.manifest.artifact.model_copy(update={"package_digest": prepared.digest})
    return Candidate(
        digest=prepared.digest,
        artifact=artifact,
        compiler=prepared.manifest.compiler,
        options=prepared.manifest.options,
    )


def _check_libraries(backend: str, asked: Sequence[Substitution]) -> None:
    """Refuse a version of a library that the backend does not use."""
    from runtime.backends.registry import BACKENDS

    used = next((one.libraries for one in BACKENDS if one.name == backend), ())
    for one in asked:
        names = VERSIONED.get(one.pin.removeprefix("compiler."), ()) if one.way is Way.VERSION else ()
        if names and not set(names) & set(used):
            raise PinRefused(
                f"is no part of the {backend} backend",
                pin=one.pin,
                fix=f"It is made of {', '.join(used) or 'nothing'}.",
            )
