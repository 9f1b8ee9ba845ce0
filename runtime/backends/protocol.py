"""What must every backend offer?  The protocol that preparation and engine code against, and the abilities table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from runtime.backends.buckets import BucketPlan
from runtime.backends.contract import Bounds, InputContract, Integers
from runtime.backends.errors import BackendRefused
from runtime.backends.invariant import program_bounds
from runtime.models.config import ModelConfig

if TYPE_CHECKING:
    from runtime.backends.one_shot import OneShotExecutor, OneShotModel, OneShotSpec

Floats = NDArray[np.float32]


class Support(StrEnum):
    """Whether a backend can do a thing, and whose doing it is when it cannot."""

    SUPPORTED = "supported"
    NOT_OURS_YET = "not_ours_yet"
    """The toolchain can; this project does not offer it yet."""
    NOT_THEIRS_YET = "not_theirs_yet"
    """The toolchain cannot at this version."""
    NEVER = "never"
    """It contradicts what the backend is."""


ABILITIES = (
    "float32",
    "bfloat16",
    "int8",
    "dynamic_shapes",
    "threads",
    "optimization_levels",
    "reproducible_build",
    "reproducible_steps",
    "batch_invariant",
    "own_process",
    "one_shot_models",
    "onnx_files",
)


@dataclass(frozen=True)
class Ability:
    """One cell of the truth table; every cell but `supported` carries its reason."""

    support: Support
    reason: str = ""


def abilities(**cells: Ability) -> dict[str, Ability]:
    """Make a complete abilities table; a missing or unknown name is an error of the backend's author."""
    if set(cells) != set(ABILITIES):
        raise ValueError(f"abilities differ from the table: {sorted(set(cells) ^ set(ABILITIES))}")
    bare = [name for name, cell in cells.items() if cell.support is not Support.SUPPORTED and not cell.reason]
    if bare:
        raise ValueError(f"abilities without a reason: {bare}")
    return cells


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a preparation is asked for; every field is identity."""

    precision: str = "float32"
    norm: str = "fused"
    """fused or unfused RMS norm of the decoder."""
    optimization: str = "default"
    """Level name of the backend; `default` is the backend's own choice, written out in the manifest."""
    flags: Mapping[str, str] = field(default_factory=dict[str, str])
    """Backend settings by name (for example inductor's `freezing`); unknown names are refused."""
    bounds: Bounds = field(default_factory=Bounds)
    """Narrowed to what `buckets` reach, where there are buckets."""
    providers: tuple[str, ...] = ()
    """Execution providers in order of preference; empty is the backend's own choice, written out in the manifest."""
    threads: int = 1
    """Compute threads while building; part of the identity of compiled code."""
    batch_invariant: bool = False
    """Whether a row's bits may depend on itself only; the flag `recipe` chooses how."""
    deadline_seconds: int = 600
    """The whole build ends by then or fails as a timeout."""
    steady_spread_percent: int | None = None
    """Stage 9 refuses when a decode step's steady times spread more than this share of their median; None: never.

    The spread leaves out the slowest run.  No identity, like the deadline: it decides readiness, not content."""
    steady_step_us: int | None = None
    """Stage 9 refuses when a single row's steady decode step takes longer; None: never."""
    buckets: BucketPlan | None = None
    """The fixed shapes to compile; None keeps the dimensions dynamic, where the backend can."""

    def __post_init__(self) -> None:
        if self.buckets is not None:
            object.__setattr__(self, "bounds", self.buckets.narrow(self.bounds))

    @property
    def program_bounds(self) -> Bounds:
        """Largest sizes inside the program: in the layout by position, new tokens have columns of the context too."""
        return program_bounds(self.bounds) if self.batch_invariant else self.bounds


@dataclass(frozen=True, kw_only=True)
class LoadSpec:
    """What a load needs to know besides the files; all of it comes from the package's manifest, but the threads."""

    config: ModelConfig
    contract: InputContract
    precision: str = "float32"
    flags: Mapping[str, str] = field(default_factory=dict[str, str])
    """The compiler manifest's flags; `norm` is among them."""
    providers: tuple[str, ...] = ()
    """Requested execution providers, in order."""
    threads: int = 1
    buckets: BucketPlan | None = None
    """The fixed shapes that the package holds; None where its dimensions are dynamic."""
    batch_invariant: bool = False
    """Whether the program wants its calls in the layout by position (`invariant.arrange`)."""


@dataclass(frozen=True)
class StepOutput:
    """What one step computed."""

    logits: Floats
    """float32 [B,T,vocab] in host memory; [B,1,vocab] where one token a row was asked for."""
    new_k: Any
    """The backend's own array [layers,B,T,kv width], to be handed to `KVPool.write` only."""
    new_v: Any


@dataclass(frozen=True, kw_only=True)
class CompileEvent:
    """One shape that a loaded package compiled at its first use."""

    shape: str
    cache_key: str
    duration_us: int
    evicted: str | None = None
    """The shape that was dropped for it, where the number of shapes is bounded."""

    def document(self) -> dict[str, Any]:
        """Describe the event without its duration."""
        return {"shape": self.shape, "cache_key": self.cache_key, "evicted": self.evicted}


@runtime_checkable
class Specializing(Protocol):
    """An executor that may compile while it runs; one that cannot has no such method."""

    def compile_events(self) -> tuple[CompileEvent, ...]:
        """Give every compile since the load, in order."""
        ...

    def compiles_lazily(self) -> bool:
        """Say whether the package was prepared to compile shapes at first use."""
        ...


class KVPool(Protocol):
    """Two flat tables of keys and values; layer i's slot s is row i*num_slots + s."""

    @property
    def num_slots(self) -> int:
        """Slots of one layer."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of both tables."""
        ...

    def write(self, slot_ids: Integers, new_k: Any, new_v: Any, *, rows: Integers, columns: Integers) -> None:
        """Put token (rows[n], columns[n]) of a step's output into slot_ids[n] of every layer; all are int64 [N]."""
        ...

    def read(self, slot_ids: Integers) -> tuple[Floats, Floats]:
        """Copy out keys and values, float32 [layers,N,kv width]; for digests and tests, not for the hot path."""
        ...


class Executor(Protocol):
    """A loaded package: the functional step on one backend."""

    @property
    def backend(self) -> str: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def precision(self) -> str: ...
    @property
    def contract(self) -> InputContract: ...
    @property
    def threads(self) -> int: ...

    def new_pool(self, num_slots: int) -> KVPool:
        """Allocate a zeroed pool of `num_slots` slots a layer."""
        ...

    def step(
        self,
        tokens: Integers,
        positions: Integers,
        slots: Integers,
        context_lengths: Integers,
        pool: KVPool,
        *,
        last: Integers | None = None,
    ) -> StepOutput:
        """Check the inputs, then run one step; `pool` is only read.  Errors: `BackendError` and its classes.

        last [B]: the one token of each row, counted in T, whose logits are wanted; None for those of all.
        """
        ...

    def close(self) -> None:
        """Release what the backend holds; the executor cannot step afterwards."""
        ...


@dataclass(frozen=True)
class Boundary:
    """What one stage of a backend's lowering gave: files or values handed on, and what it recorded."""

    emitted: Mapping[str, Any]
    """Deterministic description of what the stage emits; digested at the stage boundary."""
    record: Mapping[str, Any]
    """The specification's Record fields of the stage; what the toolchain cannot tell is {"unknown": reason}."""
    timings: Mapping[str, int] = field(default_factory=dict[str, int])
    """Microseconds by name; kept out of everything that is digested."""


class Lowering(Protocol):
    """One preparation on its way through a backend: the stages 1 to 6, called once each and in order."""

    def capture(self) -> Boundary: ...
    def represent(self) -> Boundary: ...
    def analyze(self) -> Boundary: ...
    def optimize(self) -> Boundary: ...
    def partition(self) -> Boundary: ...
    def lower(self) -> Boundary: ...

    def files(self) -> Mapping[str, Path]:
        """After `lower`: what the package must hold, by its name in the package."""
        ...

    def compiler(self) -> Mapping[str, Any]:
        """After `lower`: the fields of the compiler manifest that the backend knows."""
        ...

    def one_shot(self) -> OneShotModel | None:
        """After `capture`: the model where one call answers a request; None for a decoder."""
        ...

    def close(self) -> None:
        """End child processes and release memory; safe to call twice."""
        ...


class Backend(Protocol):
    """A way to prepare and run the functional step, and one-shot models where the table says so."""

    @property
    def name(self) -> str: ...
    @property
    def abilities(self) -> Mapping[str, Ability]: ...
    @property
    def runtime_libraries(self) -> tuple[str, ...]: ...
    @property
    def can_abort(self) -> bool: ...

    def versions(self) -> dict[str, str]:
        """Name the libraries that decide what is built and run; `BackendMissing` where one is not installed."""
        ...

    def complete(self, options: BuildOptions) -> BuildOptions:
        """Write out what the backend chooses where the options leave it open: a bucket plan where it needs one."""
        ...

    def start(self, model: Path, work: Path, options: BuildOptions) -> Lowering:
        """Begin a preparation of a checkpoint folder, a saved program or an ONNX file.

        Options and kinds of model that the abilities table does not hold are refused with `BackendRefused`.
        """
        ...

    def check_here(self, options: BuildOptions) -> None:
        """Refuse what this machine does not have, before anything is built: libraries, execution providers."""
        ...

    def import_loader(self) -> None:
        """Import what `load` needs."""
        ...

    def load(self, package: Path, spec: LoadSpec) -> Executor:
        """Load a decoder's package folder whose digests have been verified."""
        ...

    def load_one_shot(self, package: Path, spec: OneShotSpec) -> OneShotExecutor:
        """Load a one-shot package folder whose digests have been verified."""
        ...


def require(backend: str, table: Mapping[str, Ability], name: str) -> None:
    """Refuse what the abilities table does not support, with its reason."""
    cell = table.get(name)
    offered = [other for other in ("float32", "bfloat16", "int8") if table[other].support is Support.SUPPORTED]
    if cell is None:
        raise BackendRefused(
            f"{backend} knows no {name!r}",
            fix=f"choose a precision it runs: {' or '.join(offered)}",
            evidence={"backend": backend, "ability": name, "support": "unknown", "operator_details": name},
        )
    if cell.support is not Support.SUPPORTED:
        precision = name in ("float32", "bfloat16", "int8")
        raise BackendRefused(
            f"{backend} does not offer {name}: {cell.reason}",
            fix="use another backend" + (f", or precision {' or '.join(offered)} on this one" if precision else ""),
            evidence={
                "backend": backend,
                "ability": name,
                "support": cell.support.value,
                "reason": cell.reason,
                "operator_details": f"{name}: {cell.reason}",
            },
        )
