"""Canonical bytes: equal to RFC 8785 over our domain, and nothing outside it."""

from __future__ import annotations

from typing import Any

import pytest
import rfc8785
from hypothesis import given

from manifests.canonical import LARGEST_INTEGER, canonical_bytes, digest, is_digest
from manifests.errors import CanonicalError
from tests.strategies import documents, manifests


@given(documents)
def test_equals_rfc_8785(document: Any) -> None:
    assert canonical_bytes(document) == rfc8785.dumps(document)


@given(manifests)
def test_every_manifest_equals_rfc_8785(manifest: Any) -> None:
    assert manifest.canonical() == rfc8785.dumps(manifest.to_document())


@given(documents)
def test_tuples_are_lists(document: Any) -> None:
    def tupled(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(tupled(item) for item in value)
        return {key: tupled(item) for key, item in value.items()} if isinstance(value, dict) else value

    assert canonical_bytes(tupled(document)) == canonical_bytes(document)


@pytest.mark.parametrize(
    ("document", "where", "said"),
    [
        ({"a": 1.5}, "$.a", "float"),
        ({"a": [0, {"b": float("nan")}]}, "$.a[1].b", "float"),
        ({"é": 1}, "$", "not ASCII"),
        ({1: 1}, "$", "not ASCII"),
        ([LARGEST_INTEGER + 1], "$[0]", "53 bits"),
        ([-LARGEST_INTEGER - 1], "$[0]", "53 bits"),
        (["\ud800"], "$[0]", "surrogate"),
        ({"a": b"x"}, "$.a", "bytes"),
        ({"a": {1, 2}}, "$.a", "set"),
        ({"first": object(), "then": 1.0}, "$.first", "object"),
    ],
)
def test_refuses_what_has_no_canonical_form(document: Any, where: str, said: str) -> None:
    with pytest.raises(CanonicalError) as caught:
        canonical_bytes(document)
    assert caught.value.where == where
    assert said in str(caught.value)


def test_refuses_what_is_nested_too_deeply() -> None:
    document: Any = None
    for _ in range(100_000):
        document = [document]
    with pytest.raises(CanonicalError, match="too deeply"):
        canonical_bytes(document)


def test_a_digest_names_its_algorithm_and_hashes_bytes_as_they_are() -> None:
    assert digest(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest({"b": 1, "a": "x"}) == digest(b'{"a":"x","b":1}')
    assert is_digest(digest(b"")) and not is_digest("sha256:abc") and not is_digest(None)
