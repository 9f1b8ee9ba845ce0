"""What is deployed?  Tenants and their keys' hashes, routes over prepared packages, limits, tools and policy.

A deployment is a folder: `deployment.json` (this document), `keyring.json` (the keys themselves, mode 0600, for demos
and tests only), `corpus.sqlite` (articles), `crm.sqlite` (accounts and tickets). Paths in the document are relative.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from manifests.base import Count, DecimalMap, Digest, Manifest, PositiveCount
from manifests.errors import ManifestError
from manifests.scheduling import SchedulingManifest
from runtime.errors import RouteUnavailable
from runtime.serve.databases import build_corpus, build_crm
from runtime.serve.envelope import EnvelopePart, Name, Permission

DOCUMENT_FILE = "deployment.json"
KEYRING_FILE = "keyring.json"
ALL_PERMISSIONS: tuple[Permission, ...] = get_args(Permission)


class KeyRecord(EnvelopePart):
    """One API key, known by its hash only."""

    key_id: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    actor: Name
    permissions: tuple[Permission, ...]


class TenantRecord(EnvelopePart):
    """One tenant: who may act for it, and how much."""

    name: Name
    keys: tuple[KeyRecord, ...]
    requests_per_minute: PositiveCount = 6_000
    burst: PositiveCount = 600
    """Requests that may arrive at once."""
    max_concurrent: PositiveCount = 256


class RouteRecord(EnvelopePart):
    """One route: which prepared package answers, for what, at which price."""

    name: Name
    package: Digest
    capabilities: tuple[Literal["support", "completion"], ...] = ("support", "completion")
    residency: Literal["local", "hosted"] = "local"
    max_concurrent: PositiveCount = 256
    input_cost: Count = 200
    """Millionths of a dollar for 1,000 prompt tokens."""
    output_cost: Count = 800
    """Millionths of a dollar for 1,000 output tokens."""
    fallback: tuple[Name, ...] = ()
    """Routes to try next, in order."""


class RetrievalRecord(EnvelopePart):
    """Where articles come from and how they are found."""

    index_file: str = "corpus.sqlite"
    index_digest: Digest
    query_transform: str = "quoted-terms/1"
    ranking: str = "fts5-bm25/1"
    redaction_version: str = "secret-patterns/1"


class ToolServerRecord(EnvelopePart):
    """The tool server that is started with the deployment."""

    module: str = "runtime.serve.toolserver"
    database_file: str = "crm.sqlite"
    timeout_us: PositiveCount = 10_000_000
    authorization_version: str = "tenant-owns-account/1"


class PolicyRecord(EnvelopePart):
    """What is accepted, repaired, stored."""

    policy_version: str = "support-desk/1"
    repair_limit: Annotated[int, Field(ge=0, le=1)] = 1
    memory_writes: bool = True
    """Whether requests with the permission may write long-term memory."""
    citations: bool = True
    """Whether every cited source must have been provided."""
    thresholds: DecimalMap = Field(default={"groundedness": "0"})
    """Evaluation name to the least value that is accepted."""
    retention_days: PositiveCount = 30


class DeploymentDocument(Manifest):
    """The whole deployment, named by its content."""

    document: Literal["replaylab.deployment/1"] = "replaylab.deployment/1"
    name: Name
    tenants: tuple[TenantRecord, ...]
    routes: tuple[RouteRecord, ...]
    default_route: Name
    scheduling: SchedulingManifest
    retrieval: RetrievalRecord
    tools: ToolServerRecord
    policy: PolicyRecord

    def tenant(self, name: str) -> TenantRecord | None:
        """Find a tenant by name."""
        return next((tenant for tenant in self.tenants if tenant.name == name), None)

    def route(self, name: str) -> RouteRecord | None:
        """Find a route by name."""
        return next((route for route in self.routes if route.name == name), None)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment document and the folder that it speaks of."""

    folder: Path
    document: DeploymentDocument

    @property
    def digest(self) -> str:
        """Name the deployment by its content."""
        return self.document.digest

    @property
    def index_path(self) -> Path:
        """The article index."""
        return self.folder / self.document.retrieval.index_file

    @property
    def crm_path(self) -> Path:
        """The accounts and tickets."""
        return self.folder / self.document.tools.database_file

    def keys(self) -> dict[str, str]:
        """Return tenant to API key from the keyring file, where there is one."""
        path = self.folder / KEYRING_FILE
        return json.loads(path.read_text()) if path.exists() else {}

    @classmethod
    def load(cls, folder: Path) -> Deployment:
        """Read a deployment folder; raises RouteUnavailable when it holds none."""
        path = folder / DOCUMENT_FILE
        try:
            return cls(folder, DeploymentDocument.from_bytes(path.read_bytes()))
        except (OSError, ManifestError) as error:
            raise RouteUnavailable(
                f"There is no readable deployment in {folder}: {error}",
                reason="deployment_unreadable",
                evidence={"validation_output": str(error)},
                fix="Create one with `replaylab serve --create`, or give another folder.",
            ) from None


def create_support_desk(
    folder: Path,
    *,
    seed: int,
    packages: Mapping[str, str],
    scheduling: SchedulingManifest | None = None,
) -> Deployment:
    """Build the support desk that the reference model was trained for: articles, accounts, two tenants with a key each.

    Args:
        folder: created; must not hold a deployment yet.
        seed: of articles and accounts; `runtime.models.reference.task.questions(seed, n)` asks about them.
        packages: route name to package digest; the first is the default route, each falls back to the next.
        scheduling: engine settings; the defaults when None.
    """
    from runtime.models.reference import task

    if not packages:
        raise RouteUnavailable(
            "A deployment needs at least one prepared package.",
            reason="no_package",
            fix="Prepare one with `replaylab prepare MODEL --backend onnxruntime`.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    index_digest = build_corpus(folder / "corpus.sqlite", task.corpus(seed))
    build_crm(folder / "crm.sqlite", task.accounts(seed))
    keys = {tenant: f"rlk_{secrets.token_urlsafe(24)}" for tenant in task.TENANTS}
    names = list(packages)
    document = DeploymentDocument(
        name=f"support-desk-{seed}",
        tenants=tuple(_tenant(tenant, key) for tenant, key in keys.items()),
        routes=tuple(
            RouteRecord(name=name, package=packages[name], fallback=tuple(names[place + 1 :]))
            for place, name in enumerate(names)
        ),
        default_route=names[0],
        scheduling=scheduling or SchedulingManifest(),
        retrieval=RetrievalRecord(index_digest=index_digest),
        tools=ToolServerRecord(),
        policy=PolicyRecord(),
    )
    (folder / DOCUMENT_FILE).write_bytes(document.canonical())
    _write_private(folder / KEYRING_FILE, json.dumps(keys))
    return Deployment(folder, document)


def hash_key(api_key: str) -> str:
    """Return the sha256 by which a key is known, 64 hexadecimal digits."""
    return hashlib.sha256(api_key.encode()).hexdigest()


def _tenant(name: str, key: str) -> TenantRecord:
    record = KeyRecord(key_id=f"{name}-1", sha256=hash_key(key), actor=f"{name}-desk", permissions=ALL_PERMISSIONS)
    return TenantRecord(name=name, keys=(record,))


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
