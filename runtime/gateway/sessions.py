"""How is a serving session opened on this machine?  Packages from the ledger's store, this hardware."""

from __future__ import annotations

from pathlib import Path

from runtime.serve.deployment import Deployment
from runtime.serve.session import ServingSession, TextModel


def serving_session(
    ledger: Path,
    deployment: Deployment,
    *,
    threads: int = 1,
    label: str = "",
    run_id: str | None = None,
    isolate: str = "none",
) -> ServingSession:
    """Return a session over the packages in the ledger's store; enter it with `async with`.

    Args:
        ledger: holds the packages and takes the events.
        threads: compute threads of every executor.
        label: a name for the run.
        isolate: which packages run in a process of their own: `none`, `faulty` or `all`.
    """
    from runtime.backends.hosted_process import Hosting
    from runtime.prepare.load import load_package
    from runtime.prepare.store import PackageStore
    from runtime.probe import probe

    store = PackageStore(ledger)

    def load(package_digest: str) -> TextModel:
        return load_package(store, package_digest, threads=threads, hosting=Hosting.named(isolate))

    return ServingSession(ledger, deployment, load=load, hardware=probe(threads=threads), label=label, run_id=run_id)
