"""Where do a run's bytes of evidence lie, and how are they read back safely?

One file per content below ``blobs/``, written to a temporary name, synced, renamed.  Writing the same content twice
does nothing; reading verifies the digest, always.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from traces.evidence import check, hex_digest, reference_to
from traces.failures import EvidenceError
from traces.ledger.layout import sync_folder

_SYNC_THREADS = 32


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
        return self.put_many([data])[0]

    def put_many(self, contents: Sequence[bytes]) -> list[str]:
        """Store many pieces durably and return their references, with one sync a file and one a folder.

        Raises:
            OSError: something could not be written; whatever was is complete, and storing again is harmless.
        """
        from concurrent.futures import ThreadPoolExecutor  # readers, who come often, never need it

        references = [reference_to(data) for data in contents]
        wanted = dict(zip(references, contents, strict=True))
        missing = [(self.path_of(reference), data) for reference, data in wanted.items() if not self.has(reference)]
        if len(missing) > 1:
            with ThreadPoolExecutor(_SYNC_THREADS) as pool:  # concurrent syncs share the file system's journal commits
                temporaries = list(pool.map(self._write_temporary, missing))
        else:
            temporaries = [self._write_temporary(piece) for piece in missing]
        folders: set[Path] = set()
        for temporary, (path, _) in zip(temporaries, missing, strict=True):
            if not path.parent.is_dir():
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                folders.add(self.folder)
            temporary.replace(path)
            folders.add(path.parent)
        if len(folders) > 2:
            with ThreadPoolExecutor(_SYNC_THREADS) as pool:
                list(pool.map(sync_folder, folders))
        else:
            for folder in folders:
                sync_folder(folder)
        return references

    def _write_temporary(self, piece: tuple[Path, bytes]) -> Path:
        path, data = piece
        temporary = self.folder / f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return temporary

    def discard_unfinished(self) -> None:
        """Remove what killed writers left behind an hour ago or earlier."""
        for temporary in self.folder.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if temporary.stat().st_mtime < time.time() - 3_600:
                    temporary.unlink()

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
