"""Is the ledger still what was sealed, whole and in order?

Reports every finding instead of stopping at the first.  What it can prove rests on the signing key and the witness: a
holder of the key can rewrite whatever no witness has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import msgspec

from traces.envelope import decode
from traces.evidence import hex_digest
from traces.failures import EvidenceError
from traces.ledger.blobs import BlobStore
from traces.ledger.checkpoint import Checkpoint, CheckpointError, Signer, open_note, parse
from traces.ledger.drain import drain_lock
from traces.ledger.findings import Finding, VerifyReport
from traces.ledger.keys import ledger_id
from traces.ledger.layout import LedgerLayout
from traces.ledger.merkle import leaf_hash, root_of
from traces.ledger.outboxes import holds, pending_events
from traces.ledger.segments import SegmentError, SegmentRow, Segments
from traces.ledger.verify_rows import check_rows


def verify(layout: LedgerLayout, *, blobs: bool = True, progress: Callable[[int], None] | None = None) -> VerifyReport:
    """Check a ledger while no drain runs."""
    report = VerifyReport()
    if not layout.segments.is_dir():
        report.notes.append("there is no ledger here yet")
        return report
    with drain_lock(layout):
        _Verification(layout, report, progress).run(blobs=blobs)
    return report


class _Verification:
    def __init__(self, layout: LedgerLayout, report: VerifyReport, progress: Callable[[int], None] | None) -> None:
        self.layout = layout
        self.report = report
        self.segments = Segments(layout)
        self.progress = progress
        self.checkpoints: dict[int, Checkpoint] = {}
        self.public: bytes | None = None

    def run(self, *, blobs: bool) -> None:
        self.public = self._public_key()
        numbers = self.segments.numbers()
        if numbers:
            self._check_numbers(numbers)
            self._check_chain(numbers)
        self._check_heads(numbers[-1] if numbers else 0)
        if self.layout.database.exists():
            check_rows(self.layout, self.report, self.checkpoints)
        elif numbers:
            self.report.notes.append("there is no projection yet; drain or rebuild makes it")
        if blobs:
            self._check_blobs()
        waiting = pending_events(self.layout)
        if waiting:
            self.report.notes.append(f"{waiting} events wait in outboxes; they are not sealed yet")

    def find(self, kind: str, detail: str, *, segment: int | None = None, seq: int | None = None) -> None:
        self.report.findings.append(Finding(kind, detail, segment, seq))

    def _public_key(self) -> bytes | None:
        seed, public = self.layout.keys / "signing.key", self.layout.keys / "signing.pub"
        if seed.exists():
            own = Signer(seed.read_bytes()).public
            if public.exists() and public.read_bytes() != own:
                self.find("signature", "keys/signing.pub does not belong to keys/signing.key")
            return own
        if public.exists():
            return public.read_bytes()
        if self.segments.numbers():
            self.find("signature", "the ledger's public key is missing, so no signature can be checked")
        return None

    def _check_numbers(self, numbers: list[int]) -> None:
        for number in sorted(set(range(1, numbers[-1] + 1)) - set(numbers)):
            self.find("missing", f"segment {number} has no checkpoint", segment=number)
        for path in sorted(self.layout.segments.glob("*.parquet")):
            if path.stem.isdigit() and int(path.stem) not in numbers and int(path.stem) <= numbers[-1]:
                self.find(
                    "missing", f"segment {int(path.stem)} is there, its checkpoint is not", segment=int(path.stem)
                )

    def _check_chain(self, numbers: list[int]) -> None:
        previous: Checkpoint | None = None
        outboxes: dict[str, int] = {}
        for number in numbers:
            checkpoint = self._open_checkpoint(number)
            if checkpoint is None:
                previous = None
                continue
            self.checkpoints[number] = checkpoint
            if previous is not None or number == 1:
                expected_first = 1 if previous is None else previous.last + 1
                expected_root = None if previous is None else previous.root
                if (checkpoint.first, checkpoint.previous) != (expected_first, expected_root):
                    self.find("chain", f"segment {number} does not continue the one before it", segment=number)
            for part in checkpoint.ranges:
                last = outboxes.get(part.outbox, 0)
                if part.first != last + 1:
                    self.find(
                        "deleted",
                        f"events {last + 1} to {part.first - 1} of outbox {part.outbox} were never sealed",
                        segment=number,
                    )
                outboxes[part.outbox] = part.last
            self._check_segment(checkpoint)
            self.report.segments += 1
            previous = checkpoint

    def _open_checkpoint(self, number: int) -> Checkpoint | None:
        try:
            text = self.layout.checkpoint(number).read_bytes()
            if self.public is None:
                return self.segments.checkpoint(number)
            checkpoint = open_note(text, self.public)
        except (CheckpointError, OSError) as error:
            self.find("signature", f"the checkpoint of segment {number} is not valid: {error}", segment=number)
            return None
        if checkpoint.segment != number or checkpoint.ledger_id != ledger_id(self.layout):
            self.find("swapped", f"the checkpoint of segment {number} belongs to another place", segment=number)
            return None
        return checkpoint

    def _check_segment(self, checkpoint: Checkpoint) -> None:
        number = checkpoint.segment
        try:
            rows = self.segments.rows(number)
        except SegmentError as error:
            self.find("truncated", f"{error}", segment=number)
            return
        self.report.events += len(rows)
        if self.progress is not None:
            self.progress(len(rows))
        leaves = [leaf_hash(row.body) for row in rows]
        if root_of(leaves) == checkpoint.root and [row.seq for row in rows] == list(
            range(checkpoint.first, checkpoint.last + 1)
        ):
            for row, leaf in zip(rows, leaves, strict=True):
                if row.leaf != leaf:
                    self.find("edited", f"event {row.seq} carries a wrong leaf hash", segment=number, seq=row.seq)
            return
        self._explain(checkpoint, rows, leaves)

    def _explain(self, checkpoint: Checkpoint, rows: list[SegmentRow], leaves: list[bytes]) -> None:
        """Say what happened to a segment whose root is wrong, as closely as the stored columns tell."""
        number, before = checkpoint.segment, len(self.report.findings)
        for row, leaf in zip(rows, leaves, strict=True):
            if row.leaf != leaf:
                self.find("edited", f"the body of event {row.seq} was changed", segment=number, seq=row.seq)
        missing = set(range(checkpoint.first, checkpoint.last + 1)) - {row.seq for row in rows}
        if missing or len(rows) < checkpoint.leaves:
            detail = f"segment {number} holds {len(rows)} of {checkpoint.leaves} events"
            self.find("deleted", detail, segment=number, seq=min(missing, default=None))
        places = [(self._place(row), row.seq) for row in rows]
        for (earlier, _), (later, seq) in pairwise(places):
            if earlier is not None and later is not None and earlier[0] == later[0] and later[1] <= earlier[1]:
                self.find("reordered", f"event {seq} does not follow the one before it", segment=number, seq=seq)
                break
        if len(self.report.findings) == before:
            self.find("swapped", f"segment {number} is not the file that was sealed", segment=number)

    def _place(self, row: SegmentRow) -> tuple[str, int] | None:
        try:
            event = decode(row.body)
        except msgspec.DecodeError:
            return None
        return event.outbox, event.outbox_seq

    def _check_heads(self, newest: int) -> None:
        head = self._open_head("the head", self.layout.head.read_bytes() if self.layout.head.exists() else None)
        if head is None:
            if newest and not self._unfinished(0, newest):
                self.find("head", "the ledger has segments but no valid head")
        elif head.segment < newest and not self._unfinished(head.segment, newest):
            self.find("head", f"the head was rolled back to segment {head.segment} of {newest}", segment=head.segment)
        if head is not None:
            self._compare_head("the head", head, newest)
        if not self.layout.witness.exists():
            if newest:
                self.report.notes.append(
                    "there is no witness beside the ledger: a rollback of the whole folder would pass"
                )
            return
        text = self.layout.witness.read_bytes()
        if self._is_foreign(text):
            self.report.notes.append("the witness beside the ledger is another ledger's; the next drain replaces it")
            return
        witness = self._open_head("the witness", text)
        if witness is not None:
            self._compare_head("the witness", witness, newest)

    def _is_foreign(self, text: bytes) -> bool:
        """Tell whether a witness was left by a ledger that stood here before: every ledger has its own identity."""
        try:
            return parse(text).ledger_id != ledger_id(self.layout)
        except CheckpointError:
            return False

    def _open_head(self, name: str, text: bytes | None) -> Checkpoint | None:
        if text is None or self.public is None:
            return None
        try:
            head = open_note(text, self.public)
        except CheckpointError as error:
            self.find("head", f"{name} is not valid: {error}")
            return None
        if head.ledger_id != ledger_id(self.layout):
            self.find("head", f"{name} belongs to another ledger")
            return None
        return head

    def _compare_head(self, name: str, head: Checkpoint, newest: int) -> None:
        if head.segment > newest:
            detail = f"{name} knows segment {head.segment}, the ledger ends at {newest}: it was rolled back"
            self.find("head", detail, segment=head.segment)
        elif head.segment in self.checkpoints and self.checkpoints[head.segment] != head:
            self.find("head", f"{name} knows another segment {head.segment}", segment=head.segment)

    def _unfinished(self, head: int, newest: int) -> bool:
        """A drain killed between sealing and noting the head leaves one segment whose rows are still in the outbox."""
        checkpoint = self.checkpoints.get(newest)
        if checkpoint is None or newest != head + 1:
            return False
        return all(holds(self.layout, part.outbox, part.last) for part in checkpoint.ranges)

    def _check_blobs(self) -> None:
        store = BlobStore(self.layout.blobs)
        for reference in store.references():
            try:
                store.get(reference)
            except EvidenceError as error:
                if store.has(reference):
                    self.find("blob", f"{error.message} ({hex_digest(reference)[:12]})")
            self.report.blobs += 1
