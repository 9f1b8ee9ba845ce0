"""Which prepared package runs when a replay asks for another backend, precision or flag?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from manifests.artifact import ArtifactManifest
from manifests.compiler import CompilerManifest
from manifests.run import Pins
from replay.errors import PinRefused
from replay.substitutes import Substitution, Way, apply_to_pins


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One prepared package as the store describes it."""

    digest: str
    artifact: ArtifactManifest
    compiler: CompilerManifest
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What its preparation was asked for, as the package's manifest has it."""


class Preparing(Protocol):
    """Prepares a package of a model as asked, or gives None when it has not got the model."""

    def __call__(
        self, *, base: Candidate | None, model_digest: str, wanted: CompilerManifest, asked: Sequence[Substitution]
    ) -> Candidate | None: ...


@dataclass(kw_only=True)
class PackageChoice:
    """Chooses the package for a request: the recorded one unless a substitution asks for another.

    prepare  makes a package that is asked for and not there; it joins the candidates
    """

    substitutions: tuple[Substitution, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    prepare: Preparing | None = None

    @property
    def changes(self) -> bool:
        """Whether any substitution asks for another package."""
        return bool(self._asked())

    def choose(self, recorded: str, pins: Pins) -> str:
        """Return the package to run instead of `recorded`; PinRefused names the pin that no package has."""
        asked = self._asked()
        if not asked:
            return recorded
        named = next((one for one in asked if one.pin == "artifact.package_digest"), None)
        if named is not None:
            return self._by_digest(named)
        before = next((one for one in self.candidates if one.digest == recorded), None)
        base = pins if before is None else pins.replace(artifact=before.artifact, compiler=before.compiler)
        wanted = apply_to_pins(base, asked).compiler
        quantized = next((one for one in asked if one.pin == "artifact.quantization"), None)
        fitting = [
            one
            for one in self.candidates
            if one.artifact.model_digest == base.artifact.model_digest
            and (quantized is None or one.artifact.quantization == quantized.value)
            and _has(one.compiler, wanted, asked)
        ]
        if not fitting and self.prepare is not None:
            model_digest = base.artifact.model_digest
            made = self.prepare(base=before, model_digest=model_digest, wanted=wanted, asked=asked)
            if made is not None and _has(made.compiler, wanted, asked):
                self.candidates += (made,)
                fitting = [made]
        if not fitting:
            raise PinRefused(
                f"no prepared package of this model has {', '.join(one.setting for one in asked)}",
                pin=asked[0].pin,
                fix="Prepare one: replaylab prepare MODEL "
                f"--backend {wanted.backend} --precision {wanted.precision}, then replay again.",
            )
        # the fewest other changes: what was not asked for should stay as it was
        return min(fitting, key=lambda one: (_distance(one.compiler, wanted), one.digest)).digest

    def _asked(self) -> tuple[Substitution, ...]:
        return tuple(one for one in self.substitutions if one.way in (Way.PACKAGE, Way.VERSION))

    def _by_digest(self, named: Substitution) -> str:
        """Return the package whose digest is, or begins with, the value."""
        value = named.value.removeprefix("sha256:")
        found = sorted({one.digest for one in self.candidates if one.digest.removeprefix("sha256:").startswith(value)})
        if len(found) != 1 or not value:
            raise PinRefused(
                f"{len(found)} prepared packages have a digest that begins with {named.value!r}",
                pin=named.pin,
                fix="List them: replaylab packages list",
            )
        return found[0]


def _has(compiler: CompilerManifest, wanted: CompilerManifest, asked: Sequence[Substitution]) -> bool:
    """Tell whether a package has every compiler pin that was asked for."""
    paths = [path for one in asked for path in one.paths if path.startswith("compiler.")]
    return all(_value(compiler, path) == _value(wanted, path) for path in paths)


def _value(compiler: CompilerManifest, pin: str) -> object:
    _, field, *key = pin.split(".", 2)
    value = getattr(compiler, field)
    if not key:
        return value
    # a backend writes its session's options under a prefix that a caller need not give
    return value.get(key[0], value.get(f"session.{key[0]}"))


def _distance(compiler: CompilerManifest, wanted: CompilerManifest) -> int:
    """Count the choices of a person that differ; versions and passes follow from them."""
    fields = ("backend", "precision", "optimization_level", "batch_invariant")
    other = sum(getattr(compiler, field) != getattr(wanted, field) for field in fields)
    flags: Iterable[str] = compiler.flags.keys() | wanted.flags.keys()
    return 10 * other + sum(compiler.flags.get(flag) != wanted.flags.get(flag) for flag in flags)
