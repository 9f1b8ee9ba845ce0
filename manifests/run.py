"""Under which pins did one request run?  Eight digests, and the eight documents behind them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from manifests.artifact import ArtifactManifest
from manifests.base import Digest, Manifest, decimal_text, describe
from manifests.compiler import CompilerManifest
from manifests.context import ContextManifest
from manifests.errors import CanonicalError, DocumentError, PinError
from manifests.generation import GenerationManifest
from manifests.hardware import HardwareManifest
from manifests.policy import PolicyManifest
from manifests.scheduling import SchedulingManifest
from manifests.tools import ToolsManifest

DIMENSIONS = ("artifact", "compiler", "hardware", "scheduling", "generation", "context", "tools", "policy")
"""The eight dimensions in the specification's order."""

AnyManifest = TypeVar("AnyManifest", bound=Manifest)

Mode = Literal["live", "faithful", "alone", "forced", "audit"]


class RunManifest(Manifest):
    """Name everything that one request ran under; two runs differ exactly where these digests differ."""

    document: Literal["replaylab.run/1"] = "replaylab.run/1"
    kind: Literal["request", "preparation"] = "request"
    artifact: Digest
    compiler: Digest
    hardware: Digest
    scheduling: Digest
    generation: Digest
    context: Digest
    tools: Digest
    policy: Digest
    mode: Mode = "live"
    """live, or the way in which a recorded request was run again."""
    parent: str | None = None
    """Reference of the request that this one replays."""


class Pins(BaseModel):
    """All eight documents of one run together."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    artifact: ArtifactManifest
    compiler: CompilerManifest
    hardware: HardwareManifest
    scheduling: SchedulingManifest
    generation: GenerationManifest
    context: ContextManifest
    tools: ToolsManifest
    policy: PolicyManifest

    def dimension(self, name: str) -> Manifest:
        """Return the document of one dimension.

        Raises:
            PinError: there is no such dimension.
        """
        _check_name(name, DIMENSIONS, what="dimension", where=name)
        return cast(Manifest, getattr(self, name))

    def manifest(
        self,
        *,
        kind: Literal["request", "preparation"] = "request",
        mode: Mode = "live",
        parent: str | None = None,
    ) -> RunManifest:
        """Name the run that has these pins."""
        return RunManifest(
            kind=kind,
            artifact=self.artifact.digest,
            compiler=self.compiler.digest,
            hardware=self.hardware.digest,
            scheduling=self.scheduling.digest,
            generation=self.generation.digest,
            context=self.context.digest,
            tools=self.tools.digest,
            policy=self.policy.digest,
            mode=mode,
            parent=parent,
        )

    def replace(self, **documents: Manifest) -> Self:
        """Return pins in which the given dimensions are other documents.

        Raises:
            DocumentError: an unknown dimension, or a document of another one.
        """
        current: dict[str, Any] = {name: self.dimension(name) for name in DIMENSIONS}
        try:
            return type(self).model_validate(current | documents)
        except ValidationError as error:
            raise DocumentError(describe(error), where="pins") from None

    def set(self, path: str, value: Any) -> Self:
        """Return pins in which one field is another value.

        Args:
            path: ``dimension.field``, or ``dimension.field.key`` for an entry of a mapping.
            value: the value itself; a float is written as decimal text. None removes an entry of a mapping.

        Raises:
            PinError: an unknown name, with the valid ones, or a value that the field does not take.
        """
        return self._set(path, value, [decimal_text(value) if isinstance(value, float) else value])

    def set_text(self, path: str, text: str) -> Self:
        """Return pins in which one field is what a person wrote: ``null``, ``true``, ``42``, ``a,b``, or JSON.

        The field's type decides how the text is read; ``null`` is None wherever the field has it, and removes an entry
        of a mapping. Args and errors are those of ``set``.
        """
        return self._set(path, text, _readings(text))

    def _set(self, path: str, value: Any, readings: Sequence[Any]) -> Self:
        dimension, _, rest = path.partition(".")
        _check_name(dimension, DIMENSIONS, what="dimension", where=path)
        manifest = self.dimension(dimension)
        fields = tuple(name for name in type(manifest).model_fields if name != "document")
        field, _, key = rest.partition(".")
        _check_name(field, fields, what=f"field of {dimension}", where=path)
        current = getattr(manifest, field)
        if key and not isinstance(current, dict):
            raise PinError(f"{dimension}.{field} has no entries of its own", where=path, fix=f"Set {dimension}.{field}")
        changed = _with_first_fitting(manifest, field, key, value=value, readings=readings, where=path)
        return self.replace(**{dimension: changed})

    def to_documents(self) -> dict[str, dict[str, Any]]:
        """Return dimension name to plain JSON document."""
        return {name: self.dimension(name).to_document() for name in DIMENSIONS}

    @classmethod
    def from_documents(cls, documents: Mapping[str, Mapping[str, Any]]) -> Self:
        """Read what ``to_documents`` wrote.

        Raises:
            DocumentError: a dimension is missing or unknown, or a document does not fit.
        """
        missing = [name for name in DIMENSIONS if name not in documents]
        unknown = [name for name in documents if name not in DIMENSIONS]
        if missing or unknown:
            said = [f"missing: {', '.join(missing)}"] if missing else []
            said += [f"unknown: {', '.join(unknown)}"] if unknown else []
            raise DocumentError("; ".join(said), where="pins", fix=f"The dimensions are {', '.join(DIMENSIONS)}")
        return cls.model_validate({name: MANIFESTS[name].from_document(documents[name]) for name in DIMENSIONS})


MANIFESTS: Mapping[str, type[Manifest]] = {
    "artifact": ArtifactManifest,
    "compiler": CompilerManifest,
    "hardware": HardwareManifest,
    "scheduling": SchedulingManifest,
    "generation": GenerationManifest,
    "context": ContextManifest,
    "tools": ToolsManifest,
    "policy": PolicyManifest,
}
"""Dimension name to the class of its document."""


def parse_setting(text: str) -> tuple[str, str]:
    """Split ``dimension.field=value`` as it is written on a command line.

    Raises:
        PinError: there is no ``=``.
    """
    path, sign, value = text.partition("=")
    if not sign or not path:
        raise PinError("this is not a setting", where=text, fix="Write it as dimension.field=value")
    return path.strip(), value


def with_settings(manifest: AnyManifest, settings: Iterable[str], *, dimension: str) -> AnyManifest:
    """Return a document of one dimension with fields set as they are written on a command line, ``field=value``.

    Raises:
        PinError: an unknown field, with the valid ones, or a value that the field does not take.
    """
    fields = tuple(name for name in type(manifest).model_fields if name != "document")
    for setting in settings:
        field, value = parse_setting(setting)
        field = field.removeprefix(f"{dimension}.")
        _check_name(field, fields, what=f"field of {dimension}", where=setting)
        manifest = _with_first_fitting(manifest, field, "", value=value, readings=_readings(value), where=setting)
    return manifest


def _check_name(name: str, known: tuple[str, ...], *, what: str, where: str) -> None:
    if name in known:
        return
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]}? " if close else ""
    shown = f"{name!r} is no {what}" if name else f"a {what} is missing"
    raise PinError(shown, where=where, fix=f"{hint}Valid: {', '.join(known)}".strip())


def _with_first_fitting(
    manifest: AnyManifest, field: str, key: str, *, value: Any, readings: Sequence[Any], where: str
) -> AnyManifest:
    """Try each way to read the value until the whole document accepts one."""
    document = manifest.to_document()
    refusals: list[str] = []
    for candidate in readings:
        changed = dict(document)
        if not key:
            changed[field] = candidate
        elif candidate is None:
            changed[field] = {name: entry for name, entry in document[field].items() if name != key}
        else:
            changed[field] = dict(document[field]) | {key: candidate}
        try:
            return type(manifest).from_document(changed)
        except (DocumentError, CanonicalError) as error:
            refusals.append(str(error))
    wanted = "text" if key else _kind(manifest, field)
    # a reading of the right type that was refused for its value says more than one of another type
    telling = next((text for text in refusals if "should be a valid" not in text), refusals[0])
    raise PinError(f"the value {value!r} does not fit", where=where, fix=f"It takes {wanted}. {telling}")


def _readings(text: str) -> list[Any]:
    """List what a text may stand for: itself, JSON, or a list of either, in this order; null stands for nothing."""
    if text == "null":
        return [None, text]
    readings: list[Any] = [text]
    readings.extend(_as_json(text))
    words = [word.strip() for word in text.split(",")] if text else []
    readings.append(words)
    numbers = [number for word in words for number in _as_json(word)]
    if len(numbers) == len(words):
        readings.append(numbers)
    return readings


def _as_json(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except ValueError:
        return []


def _kind(manifest: Manifest, field: str) -> str:
    schema = type(manifest).model_json_schema()["properties"][field]
    if "enum" in schema:
        return "one of " + ", ".join(str(choice) for choice in schema["enum"])
    kinds = [option.get("type", "value") for option in schema.get("anyOf", [schema])]
    words = {"string": "text", "array": "a list (a,b or JSON)", "object": "a mapping (JSON)", "integer": "an integer"}
    return " or ".join(words.get(kind, str(kind)) for kind in kinds)
