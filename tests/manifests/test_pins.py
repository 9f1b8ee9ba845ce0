"""Pins: eight digests, settable by name, differing exactly where documents differ."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.artifact import ArtifactManifest
from manifests.canonical import digest
from manifests.compiler import CompilerManifest
from manifests.context import ContextManifest
from manifests.diff import diff
from manifests.errors import DocumentError, PinError
from manifests.generation import GenerationManifest
from manifests.hardware import HardwareManifest
from manifests.policy import PolicyManifest
from manifests.run import DIMENSIONS, Pins, RunManifest, parse_setting
from manifests.scheduling import SchedulingManifest
from manifests.tools import ToolsManifest
from tests.strategies import pins

PINS = Pins(
    artifact=ArtifactManifest(model="reference", family="llama", model_digest=digest(b"weights")),
    compiler=CompilerManifest(backend="eager", backend_version="2.13.0", precision="float32"),
    hardware=HardwareManifest(
        cpu_model="x", architecture="x86_64", cores=2, threads=1, memory_bytes=1, kernel="Linux", gpu="H200"
    ),
    scheduling=SchedulingManifest(),
    generation=GenerationManifest(seed=1, max_tokens=8, top_k=5),
    context=ContextManifest(),
    tools=ToolsManifest(tools={"crm.lookup": digest(b"schema")}),
    policy=PolicyManifest(policy_version="1"),
)


@given(pins)
def test_pins_survive_their_documents_and_differ_from_themselves_nowhere(these: Pins) -> None:
    assert Pins.from_documents(these.to_documents()) == these
    assert these.manifest() == these.manifest()
    assert diff(these, these) == ()


@given(pins, pins)
def test_digests_differ_exactly_in_the_dimensions_that_diff_names(left: Pins, right: Pins) -> None:
    found = diff(left, right)
    one, other = left.manifest(), right.manifest()
    assert {item.dimension for item in found} == {
        name for name in DIMENSIONS if getattr(one, name) != getattr(other, name)
    }
    assert [(item.path, item.right, item.left) for item in found] == [
        (item.path, item.left, item.right) for item in diff(right, left)
    ]


@given(pins, pins)
def test_setting_every_difference_turns_one_into_the_other(left: Pins, right: Pins) -> None:
    changed = left
    for item in diff(left, right):
        changed = changed.set(item.path, item.right)
    assert changed == right


def test_the_run_manifest_is_the_eight_digests() -> None:
    manifest = PINS.manifest(mode="faithful", parent="req_1")
    assert manifest.generation == PINS.generation.digest
    assert RunManifest.from_bytes(manifest.canonical(), manifest.digest) == manifest
    assert manifest.digest != PINS.manifest().digest


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("generation.seed", "7", 7),
        ("generation.temperature", "0.80", "0.8"),
        ("generation.top_k", "null", None),
        ("generation.stop", "a, b", ("a", "b")),
        ("generation.stop", '["a,b"]', ("a,b",)),
        ("generation.stop_token_ids", "4", (4,)),
        ("generation.sampler", "7", "7"),
        ("scheduling.batch_sizes", "1,16", (1, 16)),
        ("scheduling.policy", "fair", "fair"),
        ("compiler.batch_invariant", "true", True),
        ("compiler.precision", "null", "null"),
        ("hardware.gpu", "null", None),
        ("hardware.environment", '{"MKL_CBWR": "AVX2"}', {"MKL_CBWR": "AVX2"}),
        ("context.index_digest", digest(b"index"), digest(b"index")),
    ],
)
def test_text_is_read_as_the_type_of_its_field(path: str, text: str, value: Any) -> None:
    dimension, field = path.split(".")
    assert getattr(PINS.set_text(path, text).dimension(dimension), field) == value


@pytest.mark.parametrize(
    ("path", "value", "stored"),
    [
        ("generation.temperature", 1.5, "1.5"),
        ("generation.top_k", None, None),
        ("scheduling.batch_sizes", (1, 16), (1, 16)),
        ("hardware.threads", 2, 2),
        ("hardware.gpu", "null", "null"),
        ("hardware.environment", {"MKL_CBWR": "null"}, {"MKL_CBWR": "null"}),
    ],
)
def test_a_value_is_stored_as_it_is(path: str, value: Any, stored: Any) -> None:
    dimension, field = path.split(".")
    assert getattr(PINS.set(path, value).dimension(dimension), field) == stored


def test_entries_of_a_mapping_are_set_and_removed() -> None:
    changed = PINS.set("hardware.environment.MKL_CBWR", "COMPATIBLE")
    assert changed.hardware.environment == {"MKL_CBWR": "COMPATIBLE"}
    assert changed.set_text("hardware.environment.MKL_CBWR", "null") == PINS
    assert changed.set("hardware.environment.MKL_CBWR", None) == PINS
    assert changed.set("hardware.environment.MKL_CBWR", "null").hardware.environment == {"MKL_CBWR": "null"}
    dotted = PINS.set("tools.tools.crm.lookup", digest(b"other"))
    assert dotted.tools.tools == {"crm.lookup": digest(b"other")}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("genration.seed", "1", "Did you mean generation"),
        ("nothing", "1", "Valid: artifact, compiler"),
        ("generation.temprature", "1", "Did you mean temperature"),
        ("generation", "1", "a field of generation is missing"),
        ("generation.document", "x", "no field of generation"),
        ("generation.seed", "abc", "takes an integer"),
        ("generation.seed", "-1", "greater than or equal to 0"),
        ("generation.seed.deep", "1", "no entries of its own"),
        ("generation.stop", 5, "a list"),
        ("scheduling.policy", "best", "one of fcfs, priority, deadline, fair"),
        ("context.index_digest", "md5:1", "pattern"),
        ("hardware.environment.MKL_CBWR", 1, "takes text"),
        ("hardware.environment.a b", "1", "printable ASCII"),
        ("compiler.batch_invariant", "yes", "boolean"),
    ],
)
def test_a_wrong_setting_names_what_would_be_right(path: str, value: Any, said: str) -> None:
    setting = PINS.set_text if isinstance(value, str) else PINS.set
    with pytest.raises(PinError, match=said) as caught:
        setting(path, value)
    assert caught.value.where == path


def test_settings_are_split_at_the_first_sign() -> None:
    assert parse_setting("hardware.environment.XLA_FLAGS=--a=b") == ("hardware.environment.XLA_FLAGS", "--a=b")
    with pytest.raises(PinError, match=r"dimension\.field=value"):
        parse_setting("generation.seed")


def test_missing_and_unknown_dimensions_are_named() -> None:
    documents = PINS.to_documents()
    del documents["tools"]
    with pytest.raises(DocumentError, match=r"missing: tools; unknown: tool"):
        Pins.from_documents(documents | {"tool": {}})
    with pytest.raises(DocumentError, match="generation"):
        PINS.replace(generation=PINS.tools)


@given(st.sampled_from(DIMENSIONS))
def test_every_field_of_every_dimension_can_be_set_to_what_it_is(dimension: str) -> None:
    for field, value in PINS.dimension(dimension).to_document().items():
        if field != "document":
            assert PINS.set(f"{dimension}.{field}", value) == PINS


def test_a_later_field_is_left_out_at_its_default_and_still_differs() -> None:
    """Also inside another document, so that what was recorded before the field existed keeps its digest."""
    before, after = PINS.scheduling, PINS.set("scheduling.max_num_queued_reqs", 8).scheduling
    assert "max_num_queued_reqs" not in before.to_document()
    assert after.to_document() == before.to_document() | {"max_num_queued_reqs": 8}
    assert SchedulingManifest.from_document(after.to_document() | {"max_num_queued_reqs": None}) == before
    found = diff(PINS, PINS.replace(scheduling=after))
    assert [(item.path, item.left, item.right) for item in found] == [("scheduling.max_num_queued_reqs", None, 8)]
    assert PINS.model_dump(mode="json")["scheduling"] == before.to_document()


def test_pins_are_read_without_heavy_libraries() -> None:
    program = "import manifests.run, manifests.diff, manifests.preparation, sys; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "numpy", "polars", "duckdb", "scipy", "asyncio"):
        assert f"'{heavy}'" not in loaded
