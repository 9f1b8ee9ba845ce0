"""How the stages 7 to 9 are made to fail: damaged, foreign, unsigned packages, limits, wrong and unsteady answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from runtime.backends.eager import WEIGHTS, EagerExecutor
from runtime.backends.eager_lowering import EagerLowering
from runtime.backends.hosted import load_hosted
from runtime.backends.hosted_process import Hosting
from runtime.prepare.load import load_package, load_spec
from runtime.prepare.manifest import PackageManifest, read_config_document
from runtime.prepare.store import PackageStore, file_entry
from tests.runtime.prepare.failure_table import A, Bench, C, H, Row, T, X, small_files
from traces.failures import TelemetryPersistenceError
from traces.recorder import Recorder

UNFUSED = {"norm": "unfused"}
"""Options that make another package than the active one."""


def package_rows() -> list[Row]:
    """Stage 7."""

    def disk_full(bench: Bench) -> None:
        publish = PackageStore.publish

        def confined(self: Any, *given: Any, **named: Any) -> Any:
            with small_files(20_000):
                return publish(self, *given, **named)

        bench.patch.setattr(PackageStore, "publish", confined)
        bench.prepare(**UNFUSED)

    def incomplete(bench: Bench) -> None:
        compiler = EagerLowering.compiler

        def partly(self: Any) -> Any:
            return {name: value for name, value in compiler(self).items() if name != "backend"}

        bench.patch.setattr(EagerLowering, "compiler", partly)
        bench.prepare()

    def found_damaged(change: Callable[[Path], None]) -> Callable[[Bench], None]:
        """Damage what an earlier preparation of the same content left, between renaming and verifying."""

        def provoke(bench: Bench) -> None:
            rename = PackageStore._rename  # pyright: ignore[reportPrivateUsage]

            def and_damage(self: Any, staging: Path, target: Path) -> None:
                rename(self, staging, target)
                change(target)

            bench.patch.setattr(PackageStore, "_rename", and_damage)
            options = dict(UNFUSED, threads=2)
            try:
                bench.prepare(**options)
            finally:
                torch.set_num_threads(1)
                _remove_unfinished(bench)

        return provoke

    def row(what: str, provoke: Callable[[Bench], None], **changes: Any) -> Row:
        given = {"failure_class": A, "error": "package_refused", "keeps": True, **changes}
        return Row(stage="a07", what=what, backend="eager", provoke=provoke, **given)

    return [
        row("disk full", disk_full, failure_class=C, error="capacity_exhausted"),
        row("incomplete metadata", incomplete, error="metadata_incomplete"),
        row("written bytes are not what was digested", found_damaged(lambda folder: flip(folder / WEIGHTS))),
        row("signature is missing", found_damaged(lambda folder: (folder / "signature.json").unlink())),
    ]


def damages() -> dict[str, Callable[[Path], object]]:
    """Ways to change a package folder on disk."""

    def other_weights(folder: Path) -> None:
        arrays = load_file(folder / WEIGHTS)
        save_file({name: value * np.float32(1.01) for name, value in arrays.items()}, folder / WEIGHTS)

    def truncated(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def edited(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_bytes(path.read_bytes().replace(b'"fused"', b'"other"'))

    return {
        "truncated file": truncated,
        "one bit flipped": lambda folder: flip(folder / WEIGHTS),
        "other weights of equal size": other_weights,
        "extra file": lambda folder: (folder / "extra.py").write_text("print()"),
        "missing file": lambda folder: (folder / WEIGHTS).unlink(),
        "renamed file": lambda folder: (folder / WEIGHTS).rename(folder / "other.safetensors"),
        "edited manifest": edited,
        "unsigned package": lambda folder: (folder / "signature.json").unlink(),
        "signature of another key": lambda folder: (folder.parents[1] / "keys" / "packages.pub").write_bytes(b"1" * 32),
    }


def load_rows() -> list[Row]:
    """Stage 8."""

    def damaged(change: Callable[[Path], object]) -> Callable[[Bench], None]:
        def provoke(bench: Bench) -> None:
            store, package = bench.copied("eager")
            change(store.path(package))
            load_package(store, package)

        return provoke

    def made_for(**envelope: Any) -> Callable[[Bench], None]:
        def provoke(bench: Bench) -> None:
            store, package = bench.copied("eager")
            load_package(store, republished(store, package, envelope=envelope))

        return provoke

    def provider_gone(bench: Bench) -> None:
        store, package = bench.copied("onnxruntime")
        load_package(store, republished(store, package, compiler={"execution_providers": ["CUDAExecutionProvider"]}))

    def hosted(backend: str = "eager", **hosting: Any) -> Callable[[Bench], None]:
        def provoke(bench: Bench) -> None:
            store, package = bench.copied(backend)
            load_package(store, package, hosting=Hosting(**hosting))

        return provoke

    def crashes(bench: Bench) -> None:
        """Pass the digests by, as no user can, so that the damaged code really reaches the loader."""
        store, package = bench.copied("inductor")
        path = store.path(package) / "step.pt2"
        data = bytearray(path.read_bytes())
        start = data.index(b"\x7fELF")
        data[start + 4096 : start + 64_096] = bytes(60_000)
        path.write_bytes(data)
        manifest = store.read_manifest(package)
        load_hosted("inductor", path.parent, load_spec(manifest, read_config_document(manifest.config)), Hosting())

    def rots(bench: Bench) -> None:
        publish = PackageStore.publish

        def and_rot(self: Any, *given: Any, **named: Any) -> Any:
            package = publish(self, *given, **named)
            flip(self.path(package) / WEIGHTS)
            return package

        bench.patch.setattr(PackageStore, "publish", and_rot)
        try:
            bench.prepare(**UNFUSED)
        finally:
            _remove_unfinished(bench)

    def row(what: str, provoke: Callable[[Bench], None], backend: str = "eager", **changes: Any) -> Row:
        given = {"failure_class": A, "error": "package_refused", **changes}
        return Row(stage="a08", what=what, backend=backend, provoke=provoke, **given)

    return [
        row("bytes rot between packaging and loading", rots, keeps=True),
        *(row(what, damaged(change)) for what, change in damages().items()),
        row("made for another architecture", made_for(architecture="riscv64"), facts={"validation_output": "riscv64"}),
        row("needs another processor feature", made_for(isa=["AVX1024"]), facts={"validation_output": "AVX1024"}),
        row("made with another library version", made_for(libraries={"torch": "1.0"})),
        row("provider is gone", provider_gone, "onnxruntime", error="provider_mismatch"),
        row("memory limit", hosted(memory_bytes=0), failure_class=C, error="capacity_exhausted"),
        row("loading passes its deadline", hosted(load_deadline_us=1), failure_class=T, error="host_timed_out"),
        row("code that kills its loader", crashes, "inductor", failure_class=X, error="host_died", slow=True),
    ]


def warm_rows() -> list[Row]:
    """Stage 9."""

    def other_weights(scale: float) -> Callable[[Bench], None]:
        def provoke(bench: Bench) -> None:
            files = EagerLowering.files

            def swapped(self: Any) -> Any:
                found = dict(files(self))
                arrays = load_file(found[WEIGHTS])
                changed = found[WEIGHTS].with_name("other.safetensors")
                save_file({name: value * np.float32(scale) for name, value in arrays.items()}, changed)
                return {**found, WEIGHTS: changed}

            bench.patch.setattr(EagerLowering, "files", swapped)
            bench.prepare()

        return provoke

    def compiles(bench: Bench) -> None:
        run = EagerExecutor.run
        doubled = torch.compile(lambda value: value * 1.0, backend="eager")

        def late(self: Any, *given: Any) -> Any:
            out = run(self, *given)
            doubled(torch.from_numpy(out.logits))
            return out

        bench.patch.setattr(EagerExecutor, "run", late)
        bench.prepare(**UNFUSED)

    def unrecorded(bench: Bench) -> None:
        commit = Recorder.commit

        def full(self: Any, event_type: str, **columns: Any) -> None:
            if event_type == "stage.completed" and columns.get("stage") == "a09":
                raise TelemetryPersistenceError(
                    "the disk is full", evidence={"record_type": event_type}, fix="free disk space"
                )
            commit(self, event_type, **columns)

        bench.patch.setattr(Recorder, "commit", full)
        bench.prepare(**UNFUSED)

    def row(what: str, provoke: Callable[[Bench], None], **changes: Any) -> Row:
        given = {"failure_class": A, "error": "warmup_refused", "keeps": True, **changes}
        return Row(stage="a09", what=what, backend="eager", provoke=provoke, **given)

    return [
        row("answers are not the fixture's", other_weights(1.01)),
        row("answers are not numbers", other_weights(float("nan")), failure_class=X, error="execution_failed"),
        row(
            "unsteady latency",
            lambda bench: bench.prepare(steady_spread_percent=0),
            facts={"validation_output": "spread"},
        ),
        row("latency over its threshold", lambda bench: bench.prepare(steady_step_us=0)),
        row("a graph is compiled while warming", compiles, facts={"validation_output": "compilations"}),
        row("the record cannot be stored", unrecorded, failure_class=H, error="TelemetryPersistenceError"),
    ]


def rows() -> list[Row]:
    """Stages 7 to 9."""
    return [*package_rows(), *load_rows(), *warm_rows()]


def flip(path: Path) -> None:
    """Turn over one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def republished(store: PackageStore, package: str, **changes: dict[str, Any]) -> str:
    """Sign and publish a package whose manifest says other things."""
    folder = store.path(package)
    manifest = store.read_manifest(package)
    document = manifest.to_document()
    for name, values in changes.items():
        document[name] = {**document[name], **values}
    files = {name: folder / name for name in manifest.files}
    document["files"] = {name: file_entry(path).to_document() for name, path in files.items()}
    return store.publish(files, PackageManifest.from_document(document))


def _remove_unfinished(bench: Bench) -> None:
    """Take away what the provocation damaged, so that another one can make it anew."""
    store = PackageStore(bench.ledger)
    for package in store.digests():
        if store.readiness(package)["state"] != "ready":
            shutil.rmtree(store.path(package))
