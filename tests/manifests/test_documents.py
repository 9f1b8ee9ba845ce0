"""Manifests: named by content alone, changed by every field, frozen, strict."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from manifests.artifact import ArtifactManifest
from manifests.base import Manifest, decimal_text
from manifests.canonical import digest
from manifests.errors import DigestError, DocumentError
from manifests.generation import GenerationManifest
from manifests.hardware import HardwareManifest
from manifests.preparation import PreparationManifest
from manifests.scheduling import SchedulingManifest
from tests.strategies import artifacts, compilers, digests, manifest_pairs, manifests


@given(manifests, st.randoms(use_true_random=False))
def test_the_digest_is_stable_under_field_order_and_reserialization(manifest: Manifest, chance: Any) -> None:
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        keys = list(value)
        chance.shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}

    again = type(manifest).from_document(shuffled(json.loads(manifest.canonical())))
    assert again == manifest
    assert again.digest == manifest.digest
    assert type(manifest).from_bytes(again.canonical(), manifest.digest) == manifest


@given(manifest_pairs)
def test_the_digest_changes_with_every_field(pair: tuple[Manifest, Manifest]) -> None:
    """Take each field in turn from a second document; wherever the value differs, the digest does."""
    manifest, other = pair
    for field in type(manifest).model_fields:
        changed = manifest.model_copy(update={field: getattr(other, field)})
        assert (changed.digest == manifest.digest) == (getattr(other, field) == getattr(manifest, field)), field


def test_two_kinds_of_document_never_share_a_digest() -> None:
    kinds = [subclass.model_fields["document"].default for subclass in Manifest.__subclasses__()]
    assert len(set(kinds)) == len(kinds) >= 11


def _hardware(**changes: Any) -> HardwareManifest:
    fields: dict[str, Any] = {
        "cpu_model": "x",
        "architecture": "x86_64",
        "cores": 2,
        "threads": 1,
        "memory_bytes": 1,
        "kernel": "Linux",
    }
    return HardwareManifest(**(fields | changes))


def test_documents_cannot_change_after_they_are_made() -> None:
    manifest = _hardware(environment={"MKL_CBWR": "COMPATIBLE"})
    with pytest.raises(ValidationError, match="frozen"):
        manifest.threads = 2  # type: ignore[misc]
    for change in (
        lambda: manifest.environment.update(A="1"),
        lambda: manifest.environment.__setitem__("A", "1"),
        lambda: manifest.environment.pop("MKL_CBWR"),
        lambda: manifest.environment.clear(),
    ):
        with pytest.raises(TypeError, match="frozen"):
            change()
    assert {manifest: 1}[_hardware(environment={"MKL_CBWR": "COMPATIBLE"})] == 1
    assert copy.deepcopy(manifest) == manifest


def test_default_mappings_are_frozen_too() -> None:
    with pytest.raises(TypeError, match="frozen"):
        _hardware().environment["A"] = "1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"surprise": 1}, "Extra inputs"),
        ({"threads": "1"}, "valid integer"),
        ({"threads": True}, "valid integer"),
        ({"threads": 0}, "greater than or equal to 1"),
        ({"memory_bytes": 2**53}, "less than or equal"),
        ({"cpu_model": None}, "valid string"),
        ({"environment": {"a b": "1"}}, "printable ASCII"),
        ({"environment": {"é": "1"}}, "printable ASCII"),
        ({"cpu_model": "\ud800"}, "lone surrogate"),
    ],
)
def test_unknown_and_ill_typed_fields_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        _hardware(**changes)


def test_bytes_that_do_not_hash_to_their_name_are_not_parsed() -> None:
    with pytest.raises(DigestError, match="asked for was"):
        SchedulingManifest.from_bytes(b"not even JSON", digest(b"else"))


def test_bytes_that_are_not_canonical_are_refused() -> None:
    spaced = json.dumps(SchedulingManifest().to_document(), indent=1).encode()
    with pytest.raises(DocumentError, match="canonical form"):
        SchedulingManifest.from_bytes(spaced)
    with pytest.raises(DocumentError, match=r"SchedulingManifest: .*Invalid JSON"):
        SchedulingManifest.from_bytes(b"{")
    with pytest.raises(DocumentError, match="document"):
        SchedulingManifest.from_bytes(GenerationManifest(seed=1, max_tokens=1).canonical())


@pytest.mark.parametrize(
    ("written", "text"),
    [("1.0", "1"), ("0.80", "0.8"), (0.8, "0.8"), (0, "0"), ("-0.0", "0"), ("1e-3", "0.001"), (1e-05, "0.00001")],
)
def test_one_number_has_one_text(written: Any, text: str) -> None:
    assert decimal_text(written) == text
    assert GenerationManifest(seed=1, max_tokens=1, temperature=written).temperature == text


@pytest.mark.parametrize("written", ["nan", "inf", "warm", "", True, None, "1e999999999"])
def test_what_is_no_number_is_refused(written: Any) -> None:
    with pytest.raises(ValidationError):
        GenerationManifest(seed=1, max_tokens=1, temperature=written)


@given(artifacts, compilers, st.lists(digests, min_size=10, max_size=10, unique=True), st.integers(0, 8))
def test_preparations_compare_stage_by_stage(artifact: Any, compiler: Any, chain: list[str], changed: int) -> None:
    def prepared(links: list[str]) -> PreparationManifest:
        stages = [
            {
                "stage": f"a{number + 1:02d}",
                "name": "n",
                "input_digest": links[number],
                "output_digest": links[number + 1],
            }
            for number in range(9)
        ]
        return PreparationManifest.from_document(
            {
                "source_digest": chain[0],
                "options": {"passes": ["fold", {"deep": True}]},
                "artifact": artifact.to_document(),
                "compiler": compiler.to_document(),
                "stages": stages,
            }
        )

    one, other = prepared(chain), prepared([*chain[: changed + 1], digest(b"else"), *chain[changed + 2 :]])
    assert one.first_difference(one) is None
    assert one.first_difference(other) == other.first_difference(one) == f"a{changed + 1:02d}"
    assert PreparationManifest.from_bytes(one.canonical(), one.digest) == one


def test_preparation_stages_out_of_order_are_refused() -> None:
    empty = digest(b"")
    stage = {"stage": "a02", "name": "represent", "input_digest": empty, "output_digest": empty, "record": {}}
    document = {
        "source_digest": empty,
        "artifact": ArtifactManifest(model="m", family="llama", model_digest=empty).to_document(),
        "compiler": {"backend": "eager", "backend_version": "1", "precision": "float32"},
        "stages": [stage],
    }
    with pytest.raises(DocumentError, match="a01 in order"):
        PreparationManifest.from_document(document)
