"""Where does each part of a ledger lie on disk, and which ledger is meant when nobody says?

A ledger is a directory.  Everything in it is private to its owner (0700 and 0600): evidence holds what users typed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from traces.failures import TelemetryPersistenceError


@dataclass(frozen=True)
class LedgerLayout:
    """The paths of one ledger."""

    root: Path

    @property
    def outbox(self) -> Path:
        """One SQLite file per writing process."""
        return self.root / "outbox"

    @property
    def segments(self) -> Path:
        """Sealed Parquet files and their signed checkpoints: the truth."""
        return self.root / "segments"

    @property
    def blobs(self) -> Path:
        """Evidence by content."""
        return self.root / "blobs"

    @property
    def keys(self) -> Path:
        """Signing key, public key, pseudonym key and the ledger's identity."""
        return self.root / "keys"

    @property
    def database(self) -> Path:
        """The DuckDB projection: rebuildable, never the truth."""
        return self.root / "ledger.duckdb"

    @property
    def head(self) -> Path:
        """The newest signed checkpoint's sequence and root."""
        return self.root / "head"

    @property
    def witness(self) -> Path:
        """A copy of the head outside the ledger's folder, so that rolling the folder back is noticed."""
        return self.root.with_name(self.root.name + ".head")

    @property
    def drain_lock(self) -> Path:
        """Held by the one process that drains."""
        return self.root / "drain.lock"

    def segment(self, number: int) -> Path:
        """The Parquet file of one segment."""
        return self.segments / f"{number:08d}.parquet"

    def checkpoint(self, number: int) -> Path:
        """The signed checkpoint of one segment."""
        return self.segments / f"{number:08d}.checkpoint"

    def create(self) -> LedgerLayout:
        """Make the folders that are missing.

        Raises:
            TelemetryPersistenceError: the place cannot hold a ledger.
        """
        try:
            for folder in (self.root, self.outbox, self.segments, self.blobs, self.keys):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise TelemetryPersistenceError(
                f"The ledger {self.root} cannot be created: {error.strerror or error}.",
                evidence={"storage_target": str(self.root), "record_type": "ledger"},
                fix="give a writable folder with --ledger or REPLAYLAB_LEDGER.",
            ) from error
        return self


def default_ledger() -> Path:
    """Return the folder named by ``REPLAYLAB_LEDGER``, or ``ledger`` in the current directory."""
    return Path(os.environ.get("REPLAYLAB_LEDGER") or "ledger")


def sync_folder(folder: Path) -> None:
    """Make a rename inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a whole file so that after a crash it is either absent, old or complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
