"""Where do packages live, and are they still what they were?  A content-addressed store inside the ledger's folder.

packages/sha256-<hex>/manifest.json    the package manifest; its digest is the package's name
                      signature.json   DSSE envelope over the manifest
                      ...              exactly the files that the manifest lists
packages/sha256-<hex>.readiness.json   pending, ready or refused; a package from elsewhere has none
packages/sha256-<hex>.baseline.json    what stages 8 and 9 measured on this machine
packages/sha256-<hex>.preparation.json the nine stages without times, to rebuild and compare with
packages/aliases.json                  names that people use
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manifests.canonical import canonical_bytes, digest, is_digest
from manifests.errors import ManifestError
from manifests.preparation import PreparationManifest
from runtime.prepare import signature
from runtime.prepare.errors import PackageRefused, PackageUnknown
from runtime.prepare.manifest import PackageFile, PackageManifest
from traces.ledger.layout import LedgerLayout, sync_folder, write_durably

MANIFEST, SIGNATURE, ALIASES = "manifest.json", "signature.json", "aliases.json"


class PackageStore:
    """The packages of one ledger.  Writers stage and rename, so a reader sees a whole package or none."""

    def __init__(self, ledger: Path) -> None:
        self._layout = LedgerLayout(ledger)
        self.root = ledger / "packages"
        self.keys = self._layout.keys

    def path(self, package_digest: str) -> Path:
        """Give the folder of a package, whether it exists or not."""
        if not is_digest(package_digest):
            raise PackageUnknown(f"{package_digest!r} is not a digest", fix="give sha256:<64 hex digits> or a name")
        return self.root / package_digest.replace(":", "-")

    def digests(self) -> tuple[str, ...]:
        """List the packages that are present, sorted."""
        if not self.root.is_dir():
            return ()
        found = (entry.name.replace("-", ":", 1) for entry in self.root.iterdir() if entry.is_dir())
        return tuple(sorted(name for name in found if is_digest(name)))

    def create(self) -> None:
        """Make the folder of packages where it is not there yet."""
        self._layout.create()
        self.root.mkdir(mode=0o700, exist_ok=True)

    def publish(self, files: Mapping[str, Path], manifest: PackageManifest, *, pending: bool = False) -> str:
        """Put a package into the store under its manifest's digest; publishing the same one twice changes nothing.

        A `pending` one cannot be loaded or named until `decide` says that it is ready.
        """
        data = manifest.canonical()
        package_digest = digest(data)
        target = self.path(package_digest)
        if target.exists():
            self.verify(package_digest)
            return package_digest
        self.create()
        if pending:
            self.decide(package_digest, "pending")
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=self.root))
        try:
            for name, source in files.items():
                shutil.copyfile(source, staging / name)
                _sync_file(staging / name)
            envelope = signature.sign(data, signature.signing_key(self.keys))
            write_durably(staging / MANIFEST, data, mode=0o644)
            write_durably(staging / SIGNATURE, envelope, mode=0o644)
            self._rename(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self.verify(package_digest)
        return package_digest

    def read_manifest(self, package_digest: str) -> PackageManifest:
        """Read a manifest after checking digest and signature; the package's other files are not looked at."""
        folder = self.path(package_digest)
        if not folder.is_dir():
            raise PackageUnknown(
                f"no package {package_digest}",
                fix="`replaylab packages list` shows what is there",
                evidence={"artifact_digest": package_digest},
            )
        data = self._bytes(folder, MANIFEST, package_digest)
        if digest(data) != package_digest:
            raise self._refused(package_digest, MANIFEST, "its digest is not the package's name")
        signature.verify(data, self._bytes(folder, SIGNATURE, package_digest), self.keys)
        try:
            return PackageManifest.from_bytes(data)
        except ManifestError as error:
            raise self._refused(package_digest, MANIFEST, str(error)) from error

    def verify(self, package_digest: str) -> PackageManifest:
        """Check manifest, signature, the set of files, and every file's size and digest.  Nothing is parsed before."""
        manifest = self.read_manifest(package_digest)
        folder = self.path(package_digest)
        expected = {MANIFEST, SIGNATURE, *manifest.files}
        present = {entry.name for entry in folder.iterdir()}
        if present != expected:
            raise self._refused(package_digest, ", ".join(sorted(present ^ expected)), "missing or not listed")
        for name, listed in manifest.files.items():
            found = file_entry(folder / name, package_digest)
            if found != listed:
                raise self._refused(package_digest, name, f"expected {listed.sha256}, found {found.sha256}")
        return manifest

    def resolve(self, name: str) -> str:
        """Find the digest for a digest, an alias, or the first hex digits of exactly one package."""
        if is_digest(name):
            return name
        aliases = self.aliases()
        if name in aliases:
            return aliases[name]
        prefix = name if name.startswith("sha256:") else f"sha256:{name}"
        matches = [entry for entry in self.digests() if entry.startswith(prefix)] if len(name) >= 4 else []
        if len(matches) == 1:
            return matches[0]
        known = ", ".join(sorted(aliases)) or "none"
        raise PackageUnknown(
            f"{name!r} names {'several packages' if matches else 'no package'}; known names: {known}",
            fix="`replaylab packages list` shows what is there",
        )

    def readiness(self, package_digest: str) -> dict[str, Any]:
        """Tell `state` (pending, ready, refused; unknown for a package from elsewhere) and, if refused, `failure`."""
        try:
            return dict(json.loads(self._readiness(package_digest).read_bytes()))
        except FileNotFoundError:
            return {"state": "unknown", "failure": None}

    def decide(self, package_digest: str, state: str, failure: Mapping[str, Any] | None = None) -> None:
        """Note a readiness decision; a package that was ready stays so, whatever a later preparation of it finds."""
        if self.readiness(package_digest)["state"] != "ready":
            document = {"document": "replaylab.readiness/1", "state": state, "failure": failure and dict(failure)}
            write_durably(self._readiness(package_digest), canonical_bytes(document), mode=0o644)

    def require_usable(self, package_digest: str) -> None:
        """Refuse a package that a preparation refused or never finished."""
        found = self.readiness(package_digest)
        if found["state"] in ("ready", "unknown"):
            return
        failure = found["failure"] or {"message": "its preparation did not finish", "failure_class": None}
        raise PackageRefused(
            f"package {package_digest[:19]} is not ready: {failure['message']}",
            fix="prepare the model again; the package that was active before still is",
            evidence={
                "artifact_digest": package_digest,
                "validation_output": f"readiness {found['state']}: {failure['message']}",
                "refused_class": failure["failure_class"],
            },
            stage="a08",
        )

    def aliases(self) -> dict[str, str]:
        """Read the names that people gave to packages."""
        try:
            return dict(json.loads((self.root / ALIASES).read_bytes()))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise PackageRefused(
                f"{ALIASES} is not JSON: {error}", fix="repair or remove it; packages keep their digests"
            ) from error

    def set_alias(self, name: str, package_digest: str) -> None:
        """Point a name at a package that verifies and is ready; the old package stays."""
        if is_digest(name) or not name.isascii() or not name or any(c.isspace() or c in "/:" for c in name):
            raise PackageUnknown(f"{name!r} cannot be a package name", fix="use a word of ASCII letters and digits")
        self.read_manifest(package_digest)
        self.require_usable(package_digest)
        write_durably(self.root / ALIASES, canonical_bytes({**self.aliases(), name: package_digest}), mode=0o644)

    def write_baseline(self, package_digest: str, document: Mapping[str, Any]) -> None:
        """Keep what loading and warming measured; it is of this machine and no part of the package."""
        write_durably(self._baseline(package_digest), canonical_bytes(dict(document)), mode=0o644)

    def baseline(self, package_digest: str) -> dict[str, Any] | None:
        """Read the newest baseline; None when the package was never warmed here."""
        try:
            return dict(json.loads(self._baseline(package_digest).read_bytes()))
        except FileNotFoundError:
            return None

    def write_preparation(self, package_digest: str, preparation: PreparationManifest) -> None:
        """Keep the nine stages of the newest preparation that led to this package."""
        write_durably(self._preparation(package_digest), preparation.canonical(), mode=0o644)

    def preparation(self, package_digest: str) -> PreparationManifest | None:
        """Read the nine stages; None when the package came from elsewhere.

        The document is not covered by the package's signature: stages a01 to a06 are, in the package's own manifest.
        """
        try:
            data = self._preparation(package_digest).read_bytes()
        except FileNotFoundError:
            return None
        return PreparationManifest.from_bytes(data)

    def _preparation(self, package_digest: str) -> Path:
        return self.path(package_digest).with_suffix(".preparation.json")

    def _readiness(self, package_digest: str) -> Path:
        return self.path(package_digest).with_suffix(".readiness.json")

    def _baseline(self, package_digest: str) -> Path:
        return self.path(package_digest).with_suffix(".baseline.json")

    def _bytes(self, folder: Path, name: str, package_digest: str) -> bytes:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise self._refused(package_digest, name, "missing or not a regular file")
        return path.read_bytes()

    def _rename(self, staging: Path, target: Path) -> None:
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():  # another process published the same content first
                raise
        sync_folder(self.root)

    def _refused(self, package_digest: str, what: str, why: str) -> PackageRefused:
        return PackageRefused(
            f"package {package_digest[:19]} is not intact: {what}: {why}",
            fix="restore the package from where it was made, or prepare the model again",
            evidence={"artifact_digest": package_digest, "validation_output": f"{what}: {why}"},
        )


def file_entry(path: Path, package_digest: str = "") -> PackageFile:
    """Digest one file; links are refused, since what they point at can change."""
    if path.is_symlink() or not path.is_file():
        raise PackageRefused(
            f"{path.name} is not a regular file",
            fix="restore the package from where it was made",
            evidence={"artifact_digest": package_digest, "validation_output": path.name},
        )
    with path.open("rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()
    return PackageFile(size=path.stat().st_size, sha256=f"sha256:{name}")


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
