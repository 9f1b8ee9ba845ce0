"""Which prepared packages does a replay run, loaded once for all requests, and how do they stand on routes?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.hardware import HardwareManifest
from manifests.run import Pins
from manifests.scheduling import SchedulingManifest
from replay.errors import PinRefused
from replay.packages import Candidate
from replay.text_models import TextModel, text_model
from runtime.engine.plan import SequenceEntry, StepPlan
from traces.failures import ClassifiedError, FailureClass

if TYPE_CHECKING:
    from runtime.engine.generation import GenerationService
    from runtime.engine.playback import PlanPlayer
    from runtime.serve.services import RouteBinding


class Models:
    """Loads packages and makes plan players; each package and each player is made once."""

    def __init__(
        self,
        ledger: Path,
        *,
        threads: int,
        plans: Mapping[str, Sequence[StepPlan]],
        sequences: Mapping[str, Sequence[SequenceEntry]],
        on_loading: Callable[[str], None] = lambda package: None,
    ) -> None:
        self._ledger = ledger
        self._threads = threads
        self._plans = plans
        self._sequences = sequences
        self._on_loading = on_loading
        self._loaded: dict[str, Any] = {}
        self._texts: dict[str, TextModel] = {}
        self._players: dict[tuple[str, str, str], PlanPlayer] = {}

    def load(self, package: str) -> Any:
        """Return the loaded package, its digests verified; PinRefused when it is gone, damaged or does not fit here."""
        if package not in self._loaded:
            from runtime.prepare.load import load_package
            from runtime.prepare.store import PackageStore

            self._on_loading(package)
            try:
                self._loaded[package] = load_package(PackageStore(self._ledger), package, threads=self._threads)
            except ClassifiedError as error:
                if error.failure_class is not FailureClass.ARTIFACT_COMPATIBILITY:
                    raise
                raise PinRefused(error.message, pin="artifact.package_digest", fix=error.fix) from error
        return self._loaded[package]

    def text_only(self, package: str, pins: Pins) -> TextModel:
        """Return a package's tokenizer and pins without its executor."""
        if package not in self._texts:
            self._texts[package] = text_model(self._ledger, package, pins)
        return self._texts[package]

    def player(self, package: str, engine_id: str, scheduling: SchedulingManifest) -> PlanPlayer:
        """Return the player of one recorded engine's plans on a package."""
        key = (package, engine_id, scheduling.digest)
        if key not in self._players:
            from runtime.engine.playback import PlanPlayer

            model = self.load(package)
            self._players[key] = PlanPlayer(
                model.executor,
                model.tokenizer,
                scheduling,
                self._plans.get(engine_id, ()),
                self._sequences.get(engine_id, ()),
            )
        return self._players[key]

    def bind(
        self,
        route: str,
        package: str,
        service: GenerationService,
        *,
        hardware: HardwareManifest,
        scheduling: SchedulingManifest,
        engine_id: str,
        audited: Pins | None = None,
    ) -> RouteBinding:
        """Put a package on a route, with the service that generates for it; without its model for an audit."""
        from runtime.serve.session import bind_route

        model = self.load(package) if audited is None else self.text_only(package, audited)
        return bind_route(route, model, service, scheduling=scheduling, hardware=hardware, engine_id=engine_id)


def candidates(ledger: Path) -> tuple[Candidate, ...]:
    """Return every intact package of a ledger; a damaged or refused one is no candidate."""
    from runtime.prepare.store import PackageStore

    store = PackageStore(ledger)
    found: list[Candidate] = []
    for digest in store.digests():
        try:
            manifest = store.read_manifest(digest)
            store.require_usable(digest)
        except ClassifiedError:
            continue
        artifact = manifest.artifact.model_copy(update={"package_digest": digest})
        found.append(Candidate(digest=digest, artifact=artifact, compiler=manifest.compiler, options=manifest.options))
    return tuple(found)
