"""Stage 7: what is shipped, and under which name?"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from manifests.artifact import ArtifactManifest
from manifests.compiler import CompilerManifest
from runtime.backends.comparison import TOLERANCE
from runtime.backends.contract import InputContract
from runtime.backends.decoder_source import DECODER_SOURCE
from runtime.backends.eager import EagerExecutor
from runtime.backends.fixture import FixtureOutput, run_fixture
from runtime.backends.protocol import BuildOptions
from runtime.models.config import ModelConfig
from runtime.models.loader import Checkpoint, load_checkpoint
from runtime.prepare.capture import Source, options_document
from runtime.prepare.contents import FIXTURES, TOKENIZER, PackageContents
from runtime.prepare.lower import Lowered
from runtime.prepare.manifest import PackageManifest, config_document
from runtime.prepare.one_shot import one_shot_contents
from runtime.prepare.provenance import provenance
from runtime.prepare.reproducible import reproducible_build
from runtime.prepare.stage import Journal, StageOutcome
from runtime.prepare.store import PackageStore, file_entry

__all__ = ["FIXTURES", "TOKENIZER", "PackageStore", "Packaged", "run"]


@dataclass(frozen=True)
class Packaged:
    """Emits: an immutable, addressable artifact with a documented compatibility envelope."""

    source: Source
    digest: str
    path: Path
    manifest: PackageManifest

    def document(self) -> Mapping[str, Any]:
        """Name the package."""
        return {"package": self.digest}


def run(received: Lowered, *, store: PackageStore, journal: Journal) -> StageOutcome[Packaged]:
    """Write fixtures, bind everything in one manifest, sign it and publish the package."""
    source = received.source
    model = received.one_shot
    contents = decoder_contents(source) if model is None else one_shot_contents(source, model)
    files = {**received.files, **contents.files}
    compiler = CompilerManifest(**_with_text_flags(received.compiler))
    manifest = PackageManifest(
        artifact=contents.artifact,
        compiler=compiler,
        config=dict(contents.config),
        contract=dict(contents.contract),
        envelope=envelope_of(received, compiler),
        files={name: file_entry(path) for name, path in sorted(files.items())},
        fixture=dict(contents.fixture),
        options=options_document(source.options),
        stages=journal.stages(),
    )
    package_digest = store.publish(files, manifest, pending=True)
    size = sum(entry.size for entry in manifest.files.values())
    record = {
        "artifact_digest": package_digest,
        "size_bytes": size,
        "manifest": {name: entry.sha256 for name, entry in manifest.files.items()},
        "dependency_versions": dict(compiler.runtime_versions),
        "signature_status": "signed, Ed25519 over DSSE, verified",
        "build_provenance": provenance(
            package=package_digest,
            files={name: entry.sha256 for name, entry in manifest.files.items()},
            backend=source.backend.name,
            options=manifest.options,
            model=source.model_digest,
            libraries=compiler.runtime_versions,
            stages=manifest.stages,
            reproducible=reproducible_build(source.backend.name, source.options),
        ),
    }
    return StageOutcome(Packaged(source, package_digest, store.path(package_digest), manifest), record)


def contract_document(config: ModelConfig, options: BuildOptions) -> dict[str, Any]:
    """Write what inputs the package takes, and in which fixed shapes it runs them where it holds such."""
    contract = InputContract.of(config, options.bounds).document()
    return {**contract, "buckets": options.buckets.document()} if options.buckets else contract


def decoder_contents(source: Source) -> PackageContents:
    """Describe a checkpoint, with its tokenizer and the reference outputs of the fixture session."""
    checkpoint = load_checkpoint(source.model_folder)
    reference = write_fixtures(source, source.work / FIXTURES)
    tokenizer = {} if checkpoint.tokenizer_path is None else {TOKENIZER: checkpoint.tokenizer_path}
    return PackageContents(
        files={FIXTURES: source.work / FIXTURES, **tokenizer},
        artifact=artifact_of(checkpoint, source),
        config=config_document(checkpoint.config),
        contract=contract_document(checkpoint.config, source.options),
        fixture={
            "reference": "eager float32",
            "tolerance": f"{TOLERANCE[source.options.precision]:g}",
            "outputs": reference.digests(),
        },
    )


def write_fixtures(source: Source, path: Path) -> FixtureOutput:
    """Run the fixture session on eager float32 and keep its logits beside the model."""
    executor = EagerExecutor.from_checkpoint(source.model_folder, bounds=source.options.bounds)
    reference = run_fixture(executor)
    save_file({name: np.ascontiguousarray(array) for name, array in zip(*_parts(reference), strict=True)}, path)
    return reference


def artifact_of(checkpoint: Checkpoint, source: Source) -> ArtifactManifest:
    """Pin what was prepared; the package's own digest is filled in by whoever loads it."""
    return ArtifactManifest(
        model=source.model_folder.resolve().name,
        family=checkpoint.config.family,
        model_digest=checkpoint.digest,
        tokenizer_digest=checkpoint.file_digests.get(TOKENIZER),
        quantization="none" if source.options.precision == "float32" else source.options.precision,
    )


def envelope_of(received: Lowered, compiler: CompilerManifest) -> dict[str, Any]:
    """State where the package may be loaded: compiled code is bound to what it was compiled for.

    A decoder that is interpreted is bound to its own source; compiled and exported ones carry their graph.
    """
    interpreted = compiler.flags.get(DECODER_SOURCE)
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "isa": list(received.compiler.get("required_isa", ())),
        "libraries": {name: compiler.runtime_versions[name] for name in received.source.backend.runtime_libraries},
        **({} if interpreted is None else {"sources": {DECODER_SOURCE: interpreted}}),
    }


def _with_text_flags(compiler: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in compiler.items() if name != "required_isa"}
    fields["flags"] = {name: str(value) for name, value in sorted(fields["flags"].items())}
    return fields


def _parts(output: FixtureOutput) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    return output.names, output.logits
