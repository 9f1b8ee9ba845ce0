"""The tree is RFC 6962's: its published vectors, and proofs for every leaf."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.ledger.merkle import EMPTY_ROOT, inclusion_path, leaf_hash, root_from_path, root_of

# The inputs and roots of the Certificate Transparency reference tests for RFC 6962.
RECORDS = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def test_published_vectors() -> None:
    assert EMPTY_ROOT == hashlib.sha256().digest() == root_of([])
    leaves = [leaf_hash(record) for record in RECORDS]
    assert [root_of(leaves[:size]).hex() for size in range(1, 9)] == ROOTS


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=40), st.data())
def test_every_leaf_proves_its_membership(records: list[bytes], data: st.DataObject) -> None:
    leaves = [leaf_hash(record) for record in records]
    index = data.draw(st.integers(0, len(records) - 1))
    path = inclusion_path(leaves, index)
    assert root_from_path(leaves[index], path, index=index, size=len(leaves)) == root_of(leaves)
    assert root_from_path(leaf_hash(b"another"), path, index=index, size=len(leaves)) != root_of(leaves)


def test_a_path_of_the_wrong_length_is_refused() -> None:
    leaves = [leaf_hash(bytes([number])) for number in range(5)]
    path = inclusion_path(leaves, 2)
    with pytest.raises(ValueError, match="audit path"):
        root_from_path(leaves[2], path[:-2], index=2, size=5)
    with pytest.raises(ValueError, match="audit path"):
        root_from_path(leaves[2], [*path, path[0]], index=2, size=5)
    with pytest.raises(IndexError):
        inclusion_path(leaves, 5)
