"""What do backend, precision and batch size change, in time and in bits, on one workload?

Each cell prepares its package (or takes the one that is there), records the workload under it, and replays every
request twice: faithfully, on the recorded schedule, which must repeat to the bit; and alone, which repeats only where
the bits do not depend on who else was in the batch.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.sweep import Cell, Measured
from experiments.workloads import Workload

if TYPE_CHECKING:
    from experiments.recording import Recording
    from runtime.prepare.store import PackageStore
    from traces.envelope import TraceEvent
    from traces.ledger.ledger import Ledger

REPLAYS = ("faithful", "alone")
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class CompilerStudy:
    """What is the same for all cells.

    model     folder of the checkpoint
    ledger    takes packages, recordings and replays
    workload  the requests and their arrival times, the same for every cell
    seed      of the support desk that answers them
    warmup    requests at the start that are sent and not measured
    replays   requests that are replayed; None replays all
    """

    model: Path
    ledger: Path
    workload: Workload
    seed: int
    warmup: int = 2
    replays: int | None = None
    threads: int = 1

    def measure(self, cell: Cell, say: Say = lambda words: None) -> Measured:
        """Run one cell; raises ClassifiedError when its package cannot be prepared, loaded or served."""
        from runtime.prepare.store import PackageStore
        from traces.ledger.ledger import Ledger

        store, ledger = PackageStore(self.ledger), Ledger(self.ledger)
        say("preparing")
        package = self._package(cell, store)
        say("recording")
        recording = self._record(cell, store, package)
        ledger.drain()
        ends = [
            event
            for event in ledger.events(run_id=recording.run_id, event_type="engine.sequence")
            if event.payload.get("phase") == "finished"
        ]
        metrics = latency_metrics(recording, ends, warmup=self.warmup)
        for mode in REPLAYS:
            metrics |= self._replay(ledger, recording.run_id, mode, say)
        ledger.drain()
        tags = {"replaylab.run": recording.run_id, "replaylab.package": package} | pin_tags(ledger, recording.run_id)
        return Measured(metrics=metrics, latency=totals(recording)[self.warmup :], tags=tags)

    def _package(self, cell: Cell, store: PackageStore) -> str:
        """Return the digest of the cell's package: one prepared by a study before, or a new one."""
        from experiments.packages import prepare_package
        from runtime.models.loader import load_checkpoint

        source = load_checkpoint(self.model).digest
        alias = f"study-{cell.backend}-{cell.precision}-{source.removeprefix('sha256:')[:12]}"
        known = store.aliases().get(alias)
        if known is not None and known in store.digests():
            return known
        prepared = prepare_package(
            self.model, backend=cell.backend, precision=cell.precision, ledger=self.ledger, name=alias
        )
        return prepared.digest

    def _record(self, cell: Cell, store: PackageStore, package: str) -> Recording:
        """Record the workload under the cell's package and batch size."""
        from experiments.recording import record_workload
        from manifests.canonical import digest
        from manifests.scheduling import SchedulingManifest
        from runtime.serve.deployment import DOCUMENT_FILE, Deployment, create_support_desk

        scheduling = SchedulingManifest(max_num_seqs=cell.max_num_seqs, batch_sizes=batch_sizes(cell.max_num_seqs))
        packages = {"primary": package}
        name = digest({"seed": self.seed, "packages": packages, "scheduling": scheduling.to_document()})[7:19]
        folder = self.ledger / "deployments" / f"study-{name}"
        if (folder / DOCUMENT_FILE).exists():
            deployment = Deployment.load(folder)
        else:
            deployment = create_support_desk(folder, seed=self.seed, packages=packages, scheduling=scheduling)
        return asyncio.run(
            record_workload(
                self.workload,
                ledger=self.ledger,
                deployment=deployment,
                store=store,
                threads=self.threads,
                label=f"study {cell.name}",
            )
        )

    def _replay(self, ledger: Ledger, run_id: str, mode: Any, say: Say) -> dict[str, float]:
        """Replay the run's requests in one mode; return how many were replayed and the share that was exact."""
        from replay.batch import replay_requests

        accepted = ledger.events(run_id=run_id, event_type="request.accepted")
        wanted = [event.request_ref for event in accepted if event.request_ref is not None][: self.replays]
        if not wanted:
            return {}
        finished = 0

        def count(_: object) -> None:
            nonlocal finished
            finished += 1
            say(f"replaying {mode} {finished}/{len(wanted)}")

        say(f"replaying {mode}")
        done = replay_requests(ledger, run_id, requests=wanted, mode=mode, on_verdict=count)
        exact = sum(one.verdict.verdict == "exact" for one in done)
        return {f"replay_{mode}_requests": float(len(done)), f"replay_{mode}_exact_rate": exact / len(done)}


def latency_metrics(recording: Recording, ends: Sequence[TraceEvent], *, warmup: int) -> dict[str, float]:
    """Return times in milliseconds and rates of a recording, without its first `warmup` requests.

    Args:
        recording: what was sent and answered.
        ends: the finished generations of the run.
        warmup: requests at the start that are left out of the times.
    """
    from eval.statistics import quantile

    counted = recording.sent[warmup:]
    answers = [sent.answer for sent in counted if sent.answer is not None]
    refs = {str(answer.outcome.response["request"]) for answer in answers}
    per_token = [
        event.payload["decode_us"] / (event.output_tokens - 1)
        for event in ends
        if event.request_ref in refs and event.output_tokens is not None and event.output_tokens > 1
    ]
    samples = {
        "ttft": [answer.first_token_us for answer in answers if answer.first_token_us is not None],
        "tpot": per_token,
        "latency": [total for total in totals(recording)[warmup:] if total is not None],
    }
    metrics: dict[str, float] = {
        "requests": float(len(recording.sent)),
        "ok": float(sum(sent.answer is not None and sent.answer.outcome.status == "ok" for sent in recording.sent)),
        "events_dropped": float(recording.dropped),
    }
    for name, values in samples.items():
        for share in (50, 95):
            if values:
                metrics[f"{name}_ms_p{share}"] = quantile(values, share / 100) / 1_000
    tokens = sum(event.output_tokens or 0 for event in ends)
    if recording.wall_us:
        metrics["output_tokens_per_second"] = tokens / recording.wall_us * 1_000_000
        metrics["requests_per_second"] = len(recording.sent) / recording.wall_us * 1_000_000
    return metrics


def totals(recording: Recording) -> tuple[int | None, ...]:
    """Return each request's end-to-end time in microseconds, in order of arrival; None where it did not answer."""
    found: list[int | None] = []
    for sent in recording.sent:
        timing = None if sent.answer is None else sent.answer.outcome.response.get("timing")
        found.append(None if not timing else int(timing["total"]))
    return tuple(found)


def pin_tags(ledger: Ledger, run_id: str) -> dict[str, str]:
    """Return the digest of each dimension where all requests of a run agree, else in how many ways they differ."""
    from manifests.run import DIMENSIONS, Pins

    last = {event.request_ref: event for event in ledger.events(run_id=run_id, event_type="request.manifest")}
    seen: dict[str, set[str]] = {name: set() for name in DIMENSIONS}
    read: dict[str, Pins] = {}
    for event in last.values():
        if event.result_ref is None:
            continue
        if event.result_ref not in read:
            read[event.result_ref] = Pins.from_documents(_documents(ledger, event.result_ref))
        for name in DIMENSIONS:
            seen[name].add(read[event.result_ref].dimension(name).digest)
    return {
        f"pins.{name}": next(iter(found)) if len(found) == 1 else f"{len(found)} different, one or more a request"
        for name, found in seen.items()
        if found
    }


def batch_sizes(most: int) -> tuple[int, ...]:
    """Return the row counts that calls are padded to: powers of two up to `most`, and `most` itself."""
    sizes = {most}
    size = 1
    while size < most:
        sizes.add(size)
        size *= 2
    return tuple(sorted(sizes))


def _documents(ledger: Ledger, reference: str) -> Mapping[str, Mapping[str, Any]]:
    return json.loads(ledger.read_blob(reference))
