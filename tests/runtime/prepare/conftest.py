"""One small model, prepared once per session for every backend and precision that it can have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.backends.buckets import BucketPlan
from runtime.backends.contract import Bounds
from runtime.backends.protocol import BuildOptions
from runtime.models.random_checkpoint import random_checkpoint
from runtime.prepare.pipeline import PreparedPackage, prepare
from runtime.prepare.store import PackageStore

BOUNDS = Bounds(max_batch=16, max_tokens=64, max_context=128)
BUCKETS = {"xla": BucketPlan(decode=(1, 16), tokens=(64,), context=(128,), pool=600)}
"""Few, since each costs seconds; their reach is the whole of the bounds."""


class ListRecorder:
    """Keeps committed events and blobs in memory, with the recorder's calls."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}

    def commit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> None:
        self.events.append({"event_type": event_type, "payload": payload or {}, **columns})

    def put_blob(self, data: bytes) -> str:
        import hashlib

        name = f"evidence://sha256/{hashlib.sha256(data).hexdigest()}"
        self.blobs[name] = data
        return name


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", seed=3)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> PackageStore:
    return PackageStore(tmp_path_factory.mktemp("ledger"))


@pytest.fixture(scope="session")
def recorders() -> dict[str, ListRecorder]:
    return {}


@pytest.fixture(scope="session")
def prepared(
    model_folder: Path, store: PackageStore, recorders: dict[str, ListRecorder]
) -> Callable[[str, str], PreparedPackage]:
    """Prepare on first use; compiling takes many seconds, so never twice."""
    made: dict[tuple[str, str], PreparedPackage] = {}

    def get(backend: str, precision: str = "float32") -> PreparedPackage:
        key = (backend, precision)
        if key not in made:
            recorder = recorders.setdefault(f"{backend}-{precision}", ListRecorder())
            options = BuildOptions(precision=precision, bounds=BOUNDS, buckets=BUCKETS.get(backend))
            made[key] = prepare(model_folder, backend=backend, store=store, recorder=recorder, options=options)
        return made[key]

    return get


@pytest.fixture
def copied_store(store: PackageStore, tmp_path: Path, prepared: Callable[[str, str], PreparedPackage]) -> PackageStore:
    """A store of this test's own with the eager and ONNX Runtime packages in it, to be damaged at will."""
    prepared("eager", "float32")
    prepared("onnxruntime", "float32")
    shutil.copytree(store.root, tmp_path / "packages")
    shutil.copytree(store.keys, tmp_path / "keys")
    return PackageStore(tmp_path)
