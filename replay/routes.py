"""Which package stood on which route when a recorded request arrived?"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from replay.records import RecordedRequest

if TYPE_CHECKING:
    from traces.envelope import TraceEvent
    from traces.ledger.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A route as it stood: the package that was active on it and the engine that ran it."""

    route: str
    package: str
    engine_id: str


def standing_routes(
    ledger: Ledger, request: RecordedRequest, shared: Iterable[TraceEvent], *, default_route: str
) -> dict[str, Standing]:
    """Return the routes at the request's arrival by name.

    Activations up to the arrival say what was intended; where the request's own record says what it ran on (its first
    pins, its routing stages), that holds, because an activation may fall between arrival and routing.
    """
    accepted = request.accepted
    arrived_us = 0 if accepted is None else int(accepted.payload.get("arrived_us", accepted.ts_us))
    routes: dict[str, Standing] = {}
    engines: dict[str, str] = {}
    for event in shared:
        if event.event_type != "package.activated" or event.status != "ok" or event.model_route is None:
            continue
        package = str(event.payload["package"])
        engines.setdefault(package, event.engine_id or "")
        if event.ts_us <= arrived_us:
            routes[event.model_route] = Standing(route=event.model_route, package=package, engine_id=engines[package])
    for route, package in _ran_on(ledger, request, default_route):
        routes[route] = Standing(route=route, package=package, engine_id=engines.get(package, ""))
    return routes


def _ran_on(ledger: Ledger, request: RecordedRequest, default_route: str) -> Iterable[tuple[str, str]]:
    """Yield (route, package) as the request's own pins and routing stages say."""
    manifests = request.of_type("request.manifest")
    if manifests and manifests[0].result_ref and request.envelope is not None:
        wanted = json.loads(request.envelope)["model"]["route"] or default_route
        package = _document(ledger, manifests[0].result_ref)["artifact"]["package_digest"]
        if package is not None:
            yield wanted, package
    for event in request.of_type("stage.completed"):
        if event.stage is not None and event.stage.value == "b03" and event.result_ref:
            decision = _document(ledger, event.result_ref)
            if decision["profile"]["package"] is not None:
                yield decision["route"], decision["profile"]["package"]


def _document(ledger: Ledger, reference: str) -> dict[str, Any]:
    return json.loads(ledger.read_blob(reference))
