"""Every typical failure of the nine stages, provoked for real, has its class and never replaces what serves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

import runtime.prepare
from runtime.backends.protocol import BuildOptions
from runtime.prepare.load import load_package
from runtime.prepare.pipeline import PreparedPackage
from runtime.prepare.recorded import prepare_recorded
from runtime.prepare.store import PackageStore
from runtime.prepare.warm import validate
from runtime.serve.deployment import create_support_desk
from tests.runtime.prepare.conftest import BOUNDS
from tests.runtime.prepare.failure_table import NAME, Bench, CapturedOnnx, Row, all_rows, render
from traces.failures import ClassifiedError, decide_retry, rule_of
from traces.ledger.ledger import Ledger
from traces.stages import PREPARATION_STAGES, phase_of

Prepared = Callable[..., PreparedPackage]
ROWS = all_rows()
PARAMETERS = [
    pytest.param(row, id=f"{row.stage}-{row.backend}-{row.what}", marks=[pytest.mark.slow] if row.slow else [])
    for row in ROWS
]


@pytest.fixture(scope="module")
def serving(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with an active package under a name, and a deployment that serves it."""
    ledger = tmp_path_factory.mktemp("serving")
    package = prepare_recorded(
        model_folder, backend="eager", options=BuildOptions(bounds=BOUNDS), ledger=ledger, name=NAME
    )
    create_support_desk(ledger / "deployment", seed=0, packages={"primary": package.digest})
    return ledger


@pytest.fixture(scope="module")
def captured_onnx(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], CapturedOnnx]:
    """The tiny model's ONNX form as stage 1 gives it, captured once."""
    held: list[CapturedOnnx] = []

    def get() -> bytes:
        if not held:
            from runtime.backends import onnx_graph
            from runtime.backends.onnxruntime_lowering import OrtLowering
            from runtime.backends.registry import backend_named

            work = tmp_path_factory.mktemp("onnx")
            lowering = backend_named("onnxruntime").start(model_folder, work, BuildOptions(bounds=BOUNDS))
            assert isinstance(lowering, OrtLowering)
            lowering.capture()
            expected = onnx_graph.expected_dimensions(lowering.program)
            held.append(CapturedOnnx(lowering._model.SerializeToString(), expected, lowering.program.declared))
        return held[0]

    return get


@pytest.fixture
def bench(
    model_folder: Path,
    serving: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepared: Prepared,
    store: PackageStore,
    captured_onnx: Callable[[], CapturedOnnx],
) -> Bench:
    return Bench(model_folder, serving, tmp_path, monkeypatch, prepared, store, captured_onnx)


def standing(ledger: Path) -> dict[str, str]:
    """Digest everything that serves: the name, the active package with what stands beside it, the deployment."""
    store = PackageStore(ledger)
    active = store.path(store.resolve(NAME))
    files = [store.root / "aliases.json", *ledger.glob("deployment/**/*"), *store.root.glob(f"{active.name}.*.json")]
    files += active.iterdir()
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}


@pytest.mark.parametrize("row", PARAMETERS)
def test_a_provoked_failure_has_class_stage_retry_rule_and_evidence(row: Row, bench: Bench) -> None:
    before = standing(bench.ledger)
    packages = PackageStore(bench.ledger).digests()
    with pytest.raises(ClassifiedError) as caught:
        row.provoke(bench)
    bench.patch.undo()
    failure = caught.value
    assert (failure.failure_class, failure.error_type, failure.stage) == (row.failure_class, row.error, row.stage)
    assert decide_retry(failure.failure_class, attempt=1).action == row.retry
    demanded = rule_of(failure.failure_class).evidence
    payload = failure.to_payload()
    assert set(demanded) <= set(payload["evidence"])
    assert any(payload["evidence"][name] is not None for name in demanded), payload["evidence"]
    assert payload["phase"] == phase_of(row.stage)
    assert failure.fix
    for name, said in row.facts.items():
        assert said in str(payload["evidence"][name])
    if row.keeps:
        assert standing(bench.ledger) == before
        assert_refusal_is_recorded(bench.ledger, row)
        assert_nothing_new_is_usable(bench.ledger, packages)


def assert_refusal_is_recorded(path: Path, row: Row) -> None:
    """The ledger's newest readiness decision is this refusal, and it names what is kept."""
    ledger = Ledger(path)
    ledger.drain()
    decided = [event for event in ledger.events() if event.event_type == "readiness.decided"]
    last = [event for event in decided if event.payload["decision"] == "refused"][-1]
    assert last.payload["name"] == NAME
    assert last.payload["kept"] == PackageStore(path).resolve(NAME)
    assert (last.stage, last.failure_class, last.error_type) == (row.stage, row.failure_class, row.error)
    assert last.payload["phase"] == phase_of(row.stage)


def assert_nothing_new_is_usable(path: Path, packages: tuple[str, ...]) -> None:
    """A package that a failed preparation left can be neither loaded nor named."""
    store = PackageStore(path)
    for package in set(store.digests()) - set(packages):
        assert store.readiness(package)["state"] in ("pending", "refused")
        with pytest.raises(ClassifiedError, match="not ready"):
            load_package(store, package)
        with pytest.raises(ClassifiedError, match="not ready"):
            store.set_alias("other", package)


def test_every_stage_has_two_failures_and_one_under_the_name_of_an_active_package() -> None:
    for description in PREPARATION_STAGES:
        rows = [row for row in ROWS if row.stage == description.stage.value]
        assert len(rows) >= 2, description.title
        assert any(row.keeps and not row.slow for row in rows), description.title


def test_the_active_package_still_answers_with_its_bits(serving: Path, prepared: Prepared, store: PackageStore) -> None:
    mine = PackageStore(serving)
    active, _ = validate(load_package(mine, NAME), mine)
    other, _ = validate(load_package(store, prepared("eager", "float32").digest), store)
    assert active.digests() == other.digests()


def test_the_page_is_what_the_table_prints() -> None:
    page = Path(next(iter(runtime.prepare.__path__))) / "FAILURES.md"
    assert page.read_text() == render(ROWS), "print it anew: python -m tests.runtime.prepare.failure_table"
