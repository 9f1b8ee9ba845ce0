"""The failure matrix as data: stage, what is done to provoke the failure for real, and what must come of it.

`python -m tests.runtime.prepare.failure_table` prints `runtime/prepare/FAILURES.md`.
"""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runtime.backends import program
from runtime.backends.protocol import BuildOptions
from runtime.prepare.pipeline import PreparedPackage
from runtime.prepare.recorded import prepare_recorded
from runtime.prepare.stage import failing_at
from runtime.prepare.store import PackageStore
from tests.runtime.prepare.broken_models import rebuilt_as
from tests.runtime.prepare.conftest import BOUNDS
from traces.failures import FailureClass, decide_retry
from traces.stages import Stage, phase_of

A, S = FailureClass.ARTIFACT_COMPATIBILITY, FailureClass.SHAPE_GUARD
C, T = FailureClass.CAPACITY_ADMISSION, FailureClass.TIMEOUT_CANCELLATION
X, H = FailureClass.MODEL_PROVIDER, FailureClass.TELEMETRY_PERSISTENCE
NAME = "desk"


@dataclass(frozen=True)
class CapturedOnnx:
    """The tiny model's ONNX form as stage 1 gives it, and the dimensions that it was declared with."""

    data: bytes
    expected: Mapping[str, list[str]]
    declared: Mapping[str, list[int]]


@dataclass
class Bench:
    """What a provocation may use; `model` and `ledger` are shared, `work` is its own."""

    model: Path
    ledger: Path
    """Holds the active package, called `desk`."""
    work: Path
    patch: pytest.MonkeyPatch
    prepared: Callable[..., PreparedPackage]
    made_in: PackageStore
    captured_onnx: Callable[[], CapturedOnnx]

    def prepare(self, backend: str = "eager", model: Path | None = None, **options: Any) -> None:
        """Prepare for the name of the active package, recorded."""
        prepare_recorded(
            model or self.model,
            backend=backend,
            options=BuildOptions(**{"bounds": BOUNDS, **options}),
            ledger=self.ledger,
            name=NAME,
        )

    def copied(self, backend: str) -> tuple[PackageStore, str]:
        """Copy a finished package into a store of this provocation's own."""
        package = self.prepared(backend, "float32").digest
        store = PackageStore(self.work)
        shutil.copytree(self.made_in.path(package), store.path(package))
        shutil.copytree(self.made_in.keys, store.keys)
        return store, package

    def at(self, stage: str, work: Callable[[], object]) -> None:
        """Run a part of a stage as the stage would."""
        with failing_at(Stage(stage)):
            work()

    def decoder(self, kind: type[Any]) -> None:
        """Let the loader build decoders with a planted defect."""
        self.patch.setattr(program, "build_decoder", rebuilt_as(kind, program.build_decoder))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of the matrix: provoked for real, with class and error as they must come out."""

    stage: str
    what: str
    backend: str
    failure_class: FailureClass
    error: str
    provoke: Callable[[Bench], None]
    keeps: bool = False
    """Prepared under the name of an active package, so that the test holds the package's bytes to it."""
    slow: bool = False
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Evidence that must say this."""

    @property
    def retry(self) -> str:
        """What the retry rule decides after one attempt, without a fallback at hand."""
        return decide_retry(self.failure_class, attempt=1).action


@contextmanager
def small_files(size: int) -> Generator[None]:
    """Let no file grow beyond `size` bytes, as on a full disk: the system then says EFBIG instead of ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def all_rows() -> list[Row]:
    """The whole matrix, in the order of stages."""
    from tests.runtime.prepare import failure_rows_build, failure_rows_readiness

    return [*failure_rows_build.rows(), *failure_rows_readiness.rows()]


INTRODUCTION = """\
# How preparation fails

Every row is provoked for real by `tests/runtime/prepare/test_failure_matrix.py`, which also holds this page to the
table it is printed from (`python -m tests.runtime.prepare.failure_table`). *Retry* is what the retry rule of the class
decides after one attempt without a fallback. Rows with a dagger take long and are tried with the slow tests.

| stage | phase | backend | provoked | class | error | retry |
|---|---|---|---|---|---|---|
"""


def render(rows: list[Row]) -> str:
    """Print the matrix as the page that stands beside the stages."""
    lines = [
        f"| {row.stage} {Stage(row.stage).word} | {phase_of(row.stage)} | {row.backend} "
        f"| {row.what}{' †' if row.slow else ''} | {row.failure_class.value} | {row.error} | {row.retry} |"
        for row in rows
    ]
    return INTRODUCTION + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(all_rows()), end="")
