"""Where do a run's bytes of evidence lie, and how are they read back safely?

One file per content below ``blobs/``, written to a temporary name, synced, renamed.  Writing the same content twice
does nothing; reading verifies the digest, always.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from traces.evidence import check, hex_digest, reference_to
from traces.failures import EvidenceError
from traces.ledger.layout import sync_folder, write_durably


class BlobStore:
    """Content-addressed files: ``<folder>/ab/abcdef...``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path_of(self, reference: str) -> Path:
        """Return where the content of a reference lies (whether or not it exists)."""
        name = hex_digest(reference)
        return self.folder / name[:2] / name

    def has(self, reference: str) -> bool:
        """Tell whether the content is stored."""
        return self.path_of(reference).is_file()

    def put(self, data: bytes) -> str:
        """Store bytes durably and return their reference."""
        reference = reference_to(data)
        path = self.path_of(reference)
        if not path.is_file():
            if not path.parent.is_dir():
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                sync_folder(self.folder)
            write_durably(path, data)
        return reference

    def get(self, reference: str) -> bytes:
        """Return the bytes of a reference.

        Raises:
            EvidenceError: the content is missing or damaged.
        """
        path = self.path_of(reference)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise EvidenceError(
                f"The evidence {reference} is not in {self.folder}.",
                evidence={"record_type": "blob", "storage_target": str(self.folder)},
                fix="it was erased, or the ledger was copied without its blobs folder.",
            ) from error
        return check(reference, data)

    def erase(self, reference: str) -> bool:
        """Delete the content; the events that name it stay verifiable.  Return whether it was there."""
        path = self.path_of(reference)
        existed = path.is_file()
        path.unlink(missing_ok=True)
        if existed:
            sync_folder(path.parent)
        return existed

    def references(self) -> Iterator[str]:
        """Yield every stored reference, sorted."""
        for path in sorted(self.folder.glob("[0-9a-f][0-9a-f]/*")):
            if len(path.name) == 64:
                yield f"evidence://sha256/{path.name}"
