"""Who stands beside a request in a recorded call?  Its own tenant's requests by name, all others by a pseudonym."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger


class Neighbours:
    """Names the sequences of one engine of one run to a reader of one tenant.

    tenant: the reader's, as the ledger writes it; None sees pseudonyms only.
    """

    def __init__(self, ledger: Ledger, run_id: str, engine_id: str, *, tenant: str | None) -> None:
        self._ledger = ledger
        self._run_id = run_id
        self._engine_id = engine_id
        self._tenant = tenant
        self._known: dict[int, tuple[str | None, str | None]] | None = None

    def name(self, index: int) -> dict[str, Any]:
        """Return who a sequence index stands for."""
        tenant, request = self._table().get(index, (None, None))
        own = tenant is not None and tenant == self._tenant
        text = f"replaylab.neighbour/1:{self._run_id}:{self._engine_id}:{index}"
        return {
            "request": request if own else None,
            "pseudonym": f"neighbour_{hashlib.sha256(text.encode()).hexdigest()[:12]}",
            "own_tenant": own,
        }

    def joined(self, index: int, step: int) -> bool:
        """Tell whether a sequence joined the running set in this step."""
        from runtime.engine.plan import decode_plan

        events = self._ledger.steps(self._run_id, self._engine_id, first=step, last=step)
        plans = [decode_plan(event.payload["plan"]) for event in events]
        return any(admission.sequence == index for plan in plans for admission in plan.admissions)

    def _table(self) -> dict[int, tuple[str | None, str | None]]:
        if self._known is None:
            self._known = {
                int(event.payload["index"]): (event.tenant_ref, event.request_ref)
                for event in self._ledger.events(run_id=self._run_id, event_type="engine.sequence")
                if event.engine_id == self._engine_id
            }
        return self._known
