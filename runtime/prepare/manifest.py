"""What does a package say of itself?  One signed document whose digest is the package's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Literal

from pydantic import Field

from manifests.artifact import ArtifactManifest
from manifests.base import Count, Digest, JsonMap, Manifest
from manifests.compiler import CompilerManifest
from manifests.preparation import StageManifest
from runtime.models.config import ModelConfig, RotaryScaling


class PackageFile(Manifest):
    """Name one file of a package by its content."""

    document: Literal["replaylab.package-file/1"] = "replaylab.package-file/1"
    size: Count
    sha256: Digest


class PackageManifest(Manifest):
    """Bind code, weights, tokenizer, contract and provenance of one package.

    `artifact.package_digest` is None inside: the package's digest is the digest of this document, which cannot hold it.
    """

    document: Literal["replaylab.package/1"] = "replaylab.package/1"
    artifact: ArtifactManifest
    compiler: CompilerManifest
    config: JsonMap
    """The model's configuration; floats as text."""
    contract: JsonMap
    """Inputs: dtype, symbols with bounds, relations and index ranges."""
    envelope: JsonMap
    """Where the package may run: operating system, architecture, required instruction sets, exact library versions."""
    files: dict[str, PackageFile]
    """Every file beside this manifest and its signature, by name."""
    fixture: JsonMap
    """How far a loaded package may be from the reference outputs, and which these are."""
    options: JsonMap = Field(default_factory=dict[str, Any])
    """What the preparation was asked for."""
    stages: tuple[StageManifest, ...]
    """Stages a01 to a06 of the preparation; later ones need the package to exist."""


def config_document(config: ModelConfig) -> dict[str, Any]:
    """Write a model configuration without floats."""
    raw = asdict(config)
    raw["rope_scaling"] = _texts(raw["rope_scaling"])
    return _texts(raw)


def read_config_document(document: Mapping[str, Any]) -> ModelConfig:
    """Read what `config_document` wrote; an unknown or missing field is an error of type TypeError or KeyError."""
    raw = dict(document)
    raw["rope_scaling"] = RotaryScaling(**_numbers(RotaryScaling, dict(raw["rope_scaling"])))
    return ModelConfig(**_numbers(ModelConfig, raw))


def _texts(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: repr(value) if isinstance(value, float) else value for name, value in raw.items()}


def _numbers(kind: type[ModelConfig] | type[RotaryScaling], raw: Mapping[str, Any]) -> dict[str, Any]:
    floating = {entry.name for entry in fields(kind) if entry.type in ("float", float)}
    return {name: float(value) if name in floating else value for name, value in raw.items()}
