"""A package that is not byte for byte what was signed is refused before any parser sees it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.backends.registry import BACKENDS
from runtime.prepare import load
from runtime.prepare.errors import PackageRefused, PackageUnknown
from runtime.prepare.load import load_package
from runtime.prepare.pipeline import PreparedPackage
from runtime.prepare.store import PackageStore
from traces.failures import FailureClass


@pytest.fixture
def no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to hand the package to a backend fails the test."""

    def reached(*_: object) -> None:
        raise AssertionError("a parser was reached")

    monkeypatch.setattr(load, "backend_named", reached)
    monkeypatch.setattr(load, "read_config_document", reached)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << (position % 8)
    path.write_bytes(data)


def test_a_bit_flip_in_any_file_is_refused_before_parsing(copied_store: PackageStore, no_parser: None) -> None:
    draw = random.Random(0)
    for digest in copied_store.digests():
        for path in sorted(copied_store.path(digest).iterdir()):
            if path.name == "signature.json":
                continue
            original = path.read_bytes()
            for position in (0, len(original) - 1, *(draw.randrange(len(original)) for _ in range(24))):
                flip(path, position)
                with pytest.raises(PackageRefused) as caught:
                    load_package(copied_store, digest)
                assert caught.value.failure_class is FailureClass.ARTIFACT_COMPATIBILITY
                assert caught.value.evidence["validation_output"]
                path.write_bytes(original)


def test_a_changed_signature_is_refused(copied_store: PackageStore, no_parser: None) -> None:
    path = copied_store.path(copied_store.digests()[0]) / "signature.json"
    text = path.read_text()
    at = text.index('"sig":"') + 10
    path.write_text(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])
    with pytest.raises(PackageRefused, match="signature"):
        load_package(copied_store, copied_store.digests()[0])


@pytest.mark.parametrize("damage", ["missing", "extra", "renamed", "link", "truncated", "empty"])
def test_damaged_sets_of_files_are_refused(copied_store: PackageStore, no_parser: None, damage: str) -> None:
    folder = copied_store.path(copied_store.digests()[0])
    path = folder / "fixtures.safetensors"
    match damage:
        case "missing":
            path.unlink()
        case "extra":
            (folder / "extra.py").write_text("print()")
        case "renamed":
            path.rename(folder / "other.safetensors")
        case "link":
            moved = folder.parent / "moved"
            path.rename(moved)
            path.symlink_to(moved)
        case "truncated":
            path.write_bytes(path.read_bytes()[:100])
        case _:
            path.write_bytes(b"")
    with pytest.raises(PackageRefused):
        load_package(copied_store, copied_store.digests()[0])


def test_a_package_of_another_ledger_is_refused_until_its_key_is_there(
    copied_store: PackageStore, tmp_path: Path, prepared: Callable[..., PreparedPackage]
) -> None:
    digest = copied_store.digests()[0]
    other = PackageStore(tmp_path / "other")
    shutil.copytree(copied_store.path(digest), other.path(digest))
    with pytest.raises(PackageRefused, match="public key"):
        other.verify(digest)
    other.keys.mkdir(parents=True)
    (other.keys / "packages.pub").write_bytes(bytes(range(32)))
    with pytest.raises(PackageRefused):
        other.verify(digest)
    shutil.copy(copied_store.keys / "packages.pub", other.keys / "packages.pub")
    assert other.verify(digest) == copied_store.verify(digest)


def test_a_package_under_another_name_is_refused(copied_store: PackageStore) -> None:
    digest = copied_store.digests()[0]
    wrong = "sha256:" + "0" * 64
    copied_store.path(digest).rename(copied_store.path(wrong))
    with pytest.raises(PackageRefused):
        copied_store.verify(wrong)


def test_names_point_at_packages_and_unknown_ones_are_refused(copied_store: PackageStore) -> None:
    one, two = copied_store.digests()[:2]
    copied_store.set_alias("desk", one)
    assert copied_store.resolve("desk") == one
    copied_store.set_alias("desk", two)
    assert copied_store.resolve("desk") == two
    assert copied_store.resolve(one.removeprefix("sha256:")[:20]) == one
    for name in ("nothing", "sh", "sha256:", "../x"):
        with pytest.raises(PackageUnknown):
            copied_store.resolve(name)
    with pytest.raises(PackageUnknown):
        copied_store.set_alias("a name", one)
    with pytest.raises(PackageUnknown):
        copied_store.set_alias("gone", "sha256:" + "1" * 64)


def test_publishing_the_same_package_again_changes_nothing(
    copied_store: PackageStore, prepared: Callable[..., PreparedPackage]
) -> None:
    package = prepared("eager", "float32")
    folder = copied_store.path(package.digest)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    files = {name: folder / name for name in package.manifest.files}
    assert copied_store.publish(files, package.manifest) == package.digest
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not [path for path in copied_store.root.iterdir() if path.name.startswith(".staging")]


@pytest.fixture
def store_of_all(
    copied_store: PackageStore, store: PackageStore, prepared: Callable[..., PreparedPackage]
) -> PackageStore:
    """Every package format, those that are compiled too."""
    for backend in BACKENDS:
        compiled = prepared(backend.name, "float32").digest
        if not copied_store.path(compiled).exists():
            shutil.copytree(store.path(compiled), copied_store.path(compiled))
    return copied_store


@pytest.mark.slow
def test_five_thousand_bit_flips_over_all_formats_are_refused(store_of_all: PackageStore, no_parser: None) -> None:
    copied_store = store_of_all
    draw = random.Random(1)
    for _ in range(5000):
        digest = draw.choice(copied_store.digests())
        manifest = copied_store.path(digest) / "manifest.json"
        names = [path for path in sorted(manifest.parent.iterdir()) if path.name != "signature.json"]
        path = draw.choice(names)
        position = draw.randrange(path.stat().st_size)
        flip(path, position)
        with pytest.raises(PackageRefused):
            load_package(copied_store, digest)
        flip(path, position)
        path.touch()
    for digest in copied_store.digests():
        copied_store.verify(digest)
