"""One small run, recorded by the real runtime on random weights, shared by the tests that replay it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import runtime.models.reference as reference
from experiments.arrivals import Sent
from experiments.recording import Answered, Recording, record_workload
from experiments.workloads import Workload, WorkloadItem, WorkloadRequest
from runtime.backends.protocol import BuildOptions
from runtime.models.random_checkpoint import random_checkpoint
from runtime.models.reference import task
from runtime.prepare.pipeline import prepare
from runtime.prepare.store import PackageStore
from runtime.serve.deployment import Deployment, create_support_desk
from traces.ledger.ledger import Ledger

CANARY = "zebra quokka wombat"
"""Words that only the second tenant's questions hold."""
SEED = 5


@dataclass(frozen=True)
class Recorded:
    """A recorded run and what is needed to replay it."""

    path: Path
    ledger: Ledger
    store: PackageStore
    deployment: Deployment
    recording: Recording
    packages: dict[str, str]

    @property
    def run_id(self) -> str:
        """The run."""
        return self.recording.run_id

    def sent(self, tenant: str | None = None) -> list[Sent[Answered]]:
        """The requests of a tenant, or all, in order of arrival."""
        return [sent for sent in self.recording.sent if tenant is None or sent.request.tenant == tenant]

    def references(self, tenant: str | None = None) -> tuple[str, ...]:
        """Their references."""
        return tuple(
            str(sent.answer.outcome.response["request"]) for sent in self.sent(tenant) if sent.answer is not None
        )


def prepare_packages(
    folder: Path,
    *,
    backend: str = "eager",
    precisions: tuple[str, ...] = ("float32", "bfloat16"),
    batch_invariant: bool = False,
) -> tuple[PackageStore, dict[str, str]]:
    """Prepare a tiny random model, for eager in both precisions unless asked otherwise."""
    tokenizer = Path(reference.__file__).parent / "tokenizer.json"
    model = folder / "model"
    random_checkpoint(
        model, seed=3, vocab_size=768, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, max_positions=512,
    )  # fmt: skip
    shutil.copy(tokenizer, model / "tokenizer.json")
    store = PackageStore(folder / "ledger")
    packages = {
        precision: prepare(
            model,
            backend=backend,
            store=store,
            options=BuildOptions(precision=precision, batch_invariant=batch_invariant),
        ).digest
        for precision in precisions
    }
    return store, packages


def workload() -> Workload:
    """Twelve requests that share batches: half of them sampled, the second tenant's with the canary in them."""
    items: list[WorkloadItem] = []
    for place, question in enumerate(task.questions(SEED, 11)):
        text = f"{question.text} {CANARY}" if question.tenant == task.TENANTS[1] else question.text
        generation: dict[str, object] = {"seed": place, "max_tokens": 40}
        if place % 2 == 0:
            generation["temperature"] = "1.5"
        items.append(WorkloadRequest(at_us=place * 4_000, tenant=question.tenant, question=text, generation=generation))
    raw = WorkloadRequest(
        at_us=44_000,
        tenant=task.TENANTS[0],
        prompt_tokens=tuple(range(64, 96)),
        generation={"max_tokens": 24, "temperature": "1", "seed": 99},
    )
    return Workload(name="twelve", items=(*items, raw))


async def record(folder: Path, prepared: tuple[PackageStore, dict[str, str]] | None = None) -> Recorded:
    """Record the workload."""
    store, packages = prepared or prepare_packages(folder)
    path = folder / "ledger"
    deployment = create_support_desk(folder / "desk", seed=SEED, packages={"primary": packages["float32"]})
    recording = await record_workload(workload(), ledger=path, deployment=deployment, store=store, label="twelve")
    ledger = Ledger(path)
    ledger.drain()
    return Recorded(path, ledger, store, deployment, recording, packages)
