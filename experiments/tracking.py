"""How is an experiment kept?  MLflow runs in an SQLite store: a parent for the study, a child for each cell.

The only module that knows MLflow.  MLflow gets parameters, metrics and tags; traces stay in the ledger, which the tags
name, because one MLflow span costs as much as thousands of recorded events.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULT_STORE = "sqlite:///mlflow.db"
LONGEST_VALUE = 500
"""Characters that MLflow keeps of a parameter."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """One run in the store."""

    run_id: str
    name: str


class Tracker:
    """Writes the runs of one study; nothing global of MLflow is touched."""

    def __init__(self, store: str, experiment: str, *, name: str, params: Mapping[str, object]) -> None:
        """Open the store, making it where it is new, and start the parent run.

        Args:
            store: a tracking address, such as ``sqlite:///mlflow.db``.
            experiment: the experiment's name; made where it is new.
            name: of the parent run.
            params: what is the same for all cells.
        """
        self._client = open_client(store)
        self._experiment = _experiment_id(self._client, experiment)
        self.parent = self._start(name, {}, params)

    def child(
        self,
        name: str,
        *,
        params: Mapping[str, object],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        finished: bool = True,
    ) -> TrackedRun:
        """Keep one cell as a run under the parent; a refused cell is a run that failed."""
        run = self._start(name, {"mlflow.parentRunId": self.parent.run_id, **tags}, params)
        self._log(run, metrics)
        self._client.set_terminated(run.run_id, status="FINISHED" if finished else "FAILED")
        return run

    def finish(self, metrics: Mapping[str, float], *, finished: bool = True) -> None:
        """End the parent run."""
        self._log(self.parent, metrics)
        self._client.set_terminated(self.parent.run_id, status="FINISHED" if finished else "KILLED")

    def _start(self, name: str, tags: Mapping[str, str], params: Mapping[str, object]) -> TrackedRun:
        from mlflow.entities import Param

        run = self._client.create_run(self._experiment, run_name=name, tags=dict(tags))
        run_id = str(run.info.run_id)
        said = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in params.items()]
        self._client.log_batch(run_id, params=said)
        return TrackedRun(run_id=run_id, name=name)

    def _log(self, run: TrackedRun, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1_000)
        self._client.log_batch(run.run_id, metrics=[Metric(key, value, now, 0) for key, value in metrics.items()])


def open_client(store: str) -> MlflowClient:
    """Return a client of a store, with MLflow's telemetry off and its migration log quiet."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read once, when MLflow is imported
    os.environ["DO_NOT_TRACK"] = "true"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside MLflow's own imports
        from mlflow import MlflowClient

        for noisy in ("mlflow", "alembic"):  # MLflow sets its own levels when it is imported
            logging.getLogger(noisy).setLevel(logging.WARNING)
        return MlflowClient(tracking_uri=store)


def _experiment_id(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found is not None else client.create_experiment(name))
