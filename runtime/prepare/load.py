"""Stage 8: is the package intact, may it run here, and what does it hold in memory?"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer

from manifests.artifact import ArtifactManifest
from manifests.compiler import CompilerManifest
from manifests.scheduling import SchedulingManifest
from runtime.backends.buckets import BucketPlan
from runtime.backends.contract import InputContract
from runtime.backends.decoder_source import DECODER_SOURCE, decoder_source
from runtime.backends.executor import LoadedExecutor
from runtime.backends.hosted import load_hosted
from runtime.backends.hosted_process import Hosting
from runtime.backends.lowering import unknown
from runtime.backends.one_shot import OneShotExecutor
from runtime.backends.protocol import Executor, LoadSpec, require
from runtime.backends.registry import backend_named
from runtime.engine.errors import SettingsRefused
from runtime.engine.settings import pool_slots, settings_within
from runtime.models.config import ModelConfig
from runtime.prepare.errors import PackageRefused
from runtime.prepare.manifest import PackageManifest, read_config_document
from runtime.prepare.one_shot import OneShotPackage, is_one_shot, load_verified
from runtime.prepare.package import TOKENIZER, Packaged
from runtime.prepare.stage import StageOutcome, failing_at
from runtime.prepare.store import PackageStore
from runtime.probe import processor_flags
from traces.stages import Stage

REQUIRED_FLAGS = {
    "AVX2": ("avx2", "fma"),
    "AVX512": ("avx512f", "avx512dq", "avx512vl", "avx512bw"),
    "AVX512_VNNI": ("avx512_vnni",),
    "AMX_TILE": ("amx_tile",),
}
"""Processor flags behind the instruction sets that compiled code names."""


@dataclass(frozen=True)
class LoadedModel:
    """A verified package, ready to step."""

    digest: str
    executor: Executor
    tokenizer: Tokenizer | None
    config: ModelConfig
    manifest: PackageManifest
    artifact: ArtifactManifest
    """With the package's digest filled in."""
    compiler: CompilerManifest


@dataclass(frozen=True)
class Loaded:
    """Emits: a loaded model, ready for readiness checks."""

    packaged: Packaged
    model: LoadedModel | OneShotPackage

    def document(self) -> Mapping[str, Any]:
        """Describe what is loaded, not how long it took."""
        return {
            "package": self.model.digest,
            "backend": self.model.executor.backend,
            "precision": self.model.executor.precision,
            "threads": self.model.executor.threads,
        }


def load_package(
    store: PackageStore, digest: str, *, threads: int = 1, hosting: Hosting | None = None, candidate: bool = False
) -> LoadedModel:
    """Verify a package and load it, in a process of its own where `hosting` says how.

    A package that its preparation refused or never finished is refused here too, but as a `candidate` of stage 8.
    Every file's digest and the manifest's signature are checked before any parser sees a byte, then the compatibility
    envelope, then the backend loads.  Errors: `PackageUnknown`, `PackageRefused`, `BackendError`.
    """
    package_digest, manifest = open_package(store, digest, candidate=candidate)
    _refuse_one_shot(manifest, package_digest)
    config = read_config_document(manifest.config)
    folder = store.path(package_digest)
    with failing_at(Stage.LOAD):
        executor = _load(manifest.compiler.backend, folder, load_spec(manifest, config, threads=threads), hosting)
    tokenizer = Tokenizer.from_buffer((folder / TOKENIZER).read_bytes()) if TOKENIZER in manifest.files else None
    return LoadedModel(
        digest=package_digest,
        executor=executor,
        tokenizer=tokenizer,
        config=config,
        manifest=manifest,
        artifact=manifest.artifact.model_copy(update={"package_digest": package_digest}),
        compiler=manifest.compiler,
    )


def check_scheduling(store: PackageStore, packages: Iterable[str], scheduling: SchedulingManifest) -> None:
    """Refuse scheduling pins that an engine could not honour with these packages, before any is loaded.

    Errors: `SettingsRefused`, also for a cache larger than the machine's memory; `PackageRefused` for a one-shot
    package, which no engine runs.
    """
    for package in packages:
        manifest = store.read_manifest(package)
        _refuse_one_shot(manifest, package)
        contract = InputContract.from_document(manifest.contract)
        settings = settings_within(scheduling, contract)
        number = 2 if manifest.compiler.precision == "bfloat16" else 4
        wanted = 2 * pool_slots(settings) * contract.num_layers * contract.kv_width * number
        most = psutil.virtual_memory().total
        if wanted > most:
            raise SettingsRefused(
                f"num_blocks {settings.num_blocks} of {settings.block_size} tokens are {wanted} bytes of keys and "
                f"values with this package, and the machine has {most}",
                fix="lower scheduling.num_blocks",
            )


def load_spec(manifest: PackageManifest, config: ModelConfig, *, threads: int = 1) -> LoadSpec:
    """Read from a package's manifest what its backend needs to load it."""
    return LoadSpec(
        config=config,
        contract=InputContract.from_document(manifest.contract),
        precision=manifest.compiler.precision,
        flags=dict(manifest.compiler.flags),
        providers=manifest.compiler.execution_providers,
        threads=threads,
        buckets=BucketPlan.from_document(manifest.contract["buckets"]) if "buckets" in manifest.contract else None,
        batch_invariant=manifest.compiler.batch_invariant,
    )


def _refuse_one_shot(manifest: PackageManifest, package_digest: str) -> None:
    if is_one_shot(manifest):
        raise PackageRefused(
            f"package {package_digest[:19]} is a one-shot model, which has no tokens to decode",
            fix="call it with `replaylab infer`",
            evidence={"artifact_digest": package_digest, "operator_details": manifest.artifact.family},
            stage="a08",
        )


def _load(backend: str, folder: Path, spec: LoadSpec, hosting: Hosting | None) -> Executor:
    chosen = backend_named(backend)
    if hosting is None or (hosting.only_faulty and not chosen.can_abort):
        return chosen.load(folder, spec)
    require(backend, chosen.abilities, "own_process")
    return load_hosted(backend, folder, spec, hosting)


def load_one_shot(store: PackageStore, digest: str, *, threads: int = 1, candidate: bool = False) -> OneShotPackage:
    """Verify a one-shot package and load it, in the same order and with the same errors as `load_package`."""
    package_digest, manifest = open_package(store, digest, candidate=candidate)
    with failing_at(Stage.LOAD):
        return load_verified(store, package_digest, manifest, threads=threads)


def open_package(store: PackageStore, digest: str, *, candidate: bool = False) -> tuple[str, PackageManifest]:
    """Check every digest, the signature, readiness and the compatibility envelope; nothing of the model is parsed."""
    with failing_at(Stage.LOAD):
        package_digest = store.resolve(digest)
        manifest = store.verify(package_digest)
        if not candidate:
            store.require_usable(package_digest)
        check_envelope(manifest, package_digest)
    return package_digest, manifest


def check_envelope(manifest: PackageManifest, package_digest: str) -> None:
    """Refuse a package made for another system, processor, library version or decoder; loaders themselves do not look.

    Packages from before sources were a part of the envelope say nothing of the decoder, and load.
    """
    envelope = manifest.envelope
    installed = backend_named(manifest.compiler.backend).versions()
    sources = envelope.get("sources", {})
    here = {DECODER_SOURCE: decoder_source()} if sources else {}
    differences = {
        "system": (envelope["system"], platform.system()),
        "architecture": (envelope["architecture"], platform.machine()),
        **{name: (wanted, installed.get(name, "absent")) for name, wanted in envelope["libraries"].items()},
        **{f"compiler.flags.{name}": (wanted, here.get(name, "absent")) for name, wanted in sources.items()},
    }
    wrong = [f"{name}: made for {made}, here {found}" for name, (made, found) in differences.items() if made != found]
    if envelope["isa"]:
        flags = processor_flags()
        for name in envelope["isa"]:
            missing = [flag for flag in REQUIRED_FLAGS.get(name, (name.lower(),)) if flag not in flags]
            if missing:
                wrong.append(f"instruction set {name}: this processor lacks {', '.join(missing)}")
    if wrong:
        raise PackageRefused(
            f"package {package_digest[:19]} does not fit this machine: {'; '.join(wrong)}",
            fix="prepare the model again here, or use a machine and versions that fit",
            evidence={
                "artifact_digest": package_digest,
                "runtime_version": str(installed),
                "validation_output": "; ".join(wrong),
            },
            stage="a08",
        )


def run(received: Packaged, *, store: PackageStore) -> StageOutcome[Loaded]:
    """Load the package as a server would and record what it costs."""
    process = psutil.Process()
    before = process.memory_info().rss
    start = time.perf_counter_ns()
    one_shot = is_one_shot(received.manifest)
    load = load_one_shot if one_shot else load_package
    model = load(store, received.digest, threads=received.source.options.threads, candidate=True)
    spent = (time.perf_counter_ns() - start) // 1000
    received.source.resources.callback(model.executor.close)
    resident = process.memory_info().rss - before
    record = {
        "load_us": spent,
        "resident_memory_bytes": resident if resident > 0 else unknown("it fits into memory that the process had"),
        "device_allocation_bytes": _device_memory(model.executor),
        "cache_capacity": _cache_capacity(model, received.source.options.buckets),
        "instance_count": 1,
        "readiness_state": "loaded",
    }
    return StageOutcome(Loaded(received, model), record)


def _device_memory(executor: Executor | OneShotExecutor) -> dict[str, Any]:
    """Ask the backend what it allocated outside of what the process's resident memory tells."""
    found = executor.device_memory() if isinstance(executor, LoadedExecutor) else None
    return found or unknown("the CPU has no memory of its own beside the resident memory")


def _cache_capacity(model: LoadedModel | OneShotPackage, plan: BucketPlan | None) -> dict[str, Any]:
    """Say what a slot costs, from pools of one and of two slots, and how many there may be.

    Where both take the same, the backend compiled fixed shapes and always allocates the plan's whole pool.
    """
    if isinstance(model, OneShotPackage):
        return unknown("a one-shot model keeps nothing between calls")
    one, two = (model.executor.new_pool(slots).nbytes for slots in (1, 2))
    if plan is None or two > one:
        return {"bytes_per_slot": two - one, "slots": "chosen by the scheduler"}
    return {"bytes_per_slot": one // plan.pool, "slots": plan.pool}
