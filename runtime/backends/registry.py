"""Which backends are there, and what can each do?  The truth table; libraries are imported only when one is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from runtime.backends.buckets import default_plan
from runtime.backends.errors import BackendMissing, BackendRefused
from runtime.backends.invariant import RECIPE, RECIPES
from runtime.backends.protocol import (
    Ability,
    Backend,
    BuildOptions,
    Executor,
    LoadSpec,
    Lowering,
    Support,
    abilities,
    require,
)
from runtime.models.source import ModelKind, kind_of

if TYPE_CHECKING:
    from runtime.backends.one_shot import OneShotExecutor, OneShotSpec

YES = Ability(Support.SUPPORTED)
NAMES = ("NAME;NAME;...",)
"""Values of a flag that takes names which only the toolchain knows; the lowering refuses unknown ones."""


def _not_ours(reason: str) -> Ability:
    return Ability(Support.NOT_OURS_YET, reason)


def _not_theirs(reason: str) -> Ability:
    return Ability(Support.NOT_THEIRS_YET, reason)


def _never(reason: str) -> Ability:
    return Ability(Support.NEVER, reason)


@dataclass(frozen=True, kw_only=True)
class InstalledBackend:
    """One row of the table; the modules behind it are imported at first use."""

    name: str
    abilities: Mapping[str, Ability]
    libraries: tuple[str, ...]
    """Distributions whose versions decide what is built and run."""
    runtime_libraries: tuple[str, ...]
    """Those of them that a loaded package runs on; a package is bound to their exact versions."""
    lowering: str
    """module:class of the lowering."""
    loader: str
    """module:function that loads a package."""
    one_shot_loader: str | None = None
    """module:function that loads a one-shot package; None where the table says that there are none."""
    onnx_lowering: str | None = None
    """module:class of the lowering of an ONNX file; None where the table says that there is none."""
    levels: tuple[str, ...] = ("default",)
    flags: Mapping[str, tuple[str, ...]]
    """Flags that a caller may set, with their values."""
    providers: tuple[str, ...] | None = None
    """None where execution providers are no notion of the backend; else those that this project has tried."""
    providers_here: str | None = None
    """module:function that refuses execution providers which are not installed; None where they are no notion."""
    buckets: Literal["never", "optional", "needed"] = "never"
    """Whether it compiles fixed shapes from a declared bucket plan."""
    can_abort: bool = False
    """Whether a fault in it can end the process it runs in; what `serve --isolate faulty` hosts."""
    extra: str | None = None
    """The project's extra that installs the libraries; None for those that always come along."""

    def versions(self) -> dict[str, str]:
        """Name the installed versions; `BackendMissing` with the extra to install where one is absent."""
        found: dict[str, str] = {}
        for library in self.libraries:
            try:
                found[library] = version(library)
            except PackageNotFoundError as error:
                wanted = f"replaylab[{self.extra}]" if self.extra else library
                raise BackendMissing(
                    f"the {self.name} backend needs {library}, which is not installed",
                    fix=f"pip install '{wanted}'",
                    evidence={"runtime_version": "absent", "operator_details": library},
                ) from error
        return found

    def complete(self, options: BuildOptions) -> BuildOptions:
        """Write out what the backend chooses where the options leave it open: a bucket plan where it needs one."""
        if self.buckets == "needed" and options.buckets is None:
            return replace(options, buckets=default_plan(options.bounds))
        return options

    def start(self, model: Path, work: Path, options: BuildOptions) -> Lowering:
        """Begin a preparation after checking what was asked for against the table."""
        kind, _ = kind_of(model)
        options = options if kind.one_shot else self.complete(options)
        self.check(options)
        if kind is ModelKind.ONNX:
            require(self.name, self.abilities, "onnx_files")
        if kind.one_shot:
            require(self.name, self.abilities, "one_shot_models")
            if options.batch_invariant:
                self._among("batch invariance of", kind.value, ("a decoder's functional step",))
        lowering = self.lowering
        if kind is ModelKind.ONNX:
            lowering = self.onnx_lowering or self.lowering
        made: Callable[..., Lowering] = _load_object(lowering)
        return made(model, work, options, versions=self.versions())

    def load(self, package: Path, spec: LoadSpec) -> Executor:
        """Load a package folder whose digests have been verified."""
        require(self.name, self.abilities, spec.precision)
        self.versions()
        loader: Callable[[Path, LoadSpec], Executor] = _load_object(self.loader)
        return loader(package, spec)

    def load_one_shot(self, package: Path, spec: OneShotSpec) -> OneShotExecutor:
        """Load a one-shot package folder whose digests have been verified."""
        require(self.name, self.abilities, spec.precision)
        require(self.name, self.abilities, "one_shot_models")
        self.versions()
        loader: Callable[[Path, OneShotSpec], OneShotExecutor] = _load_object(self.one_shot_loader or "")
        return loader(package, spec)

    def import_loader(self) -> None:
        """Import what `load` needs, so that what it takes afterwards is the package's own."""
        _load_object(self.loader)

    def check(self, options: BuildOptions) -> None:
        """Refuse a precision, level, flag or norm that this backend does not offer."""
        require(self.name, self.abilities, options.precision)
        self._among("optimization", options.optimization, self.levels)
        self._among("norm", options.norm, ("fused", "unfused"))
        if options.batch_invariant:
            require(self.name, self.abilities, "batch_invariant")
        elif RECIPE in options.flags:
            self._takes_no("flag recipe without batch_invariant", options.flags[RECIPE])
        for name, value in options.flags.items():
            self._among("flag", name, tuple(self.flags))
            if self.flags[name] != NAMES or re.fullmatch(r"\w+(;\w+)*", value) is None:
                self._among(f"flag {name}", value, self.flags[name])
        if options.threads < 1:
            self._among("threads", str(options.threads), ("1 or more",))
        if options.providers and self.providers is None:
            self._takes_no("execution providers", ", ".join(options.providers))
        if options.buckets is not None and self.buckets == "never":
            self._takes_no("buckets", options.buckets.text(), reason=", its shapes are dynamic")

    def check_here(self, options: BuildOptions) -> None:
        """Refuse what this machine does not have, before anything is built: libraries, execution providers."""
        self.versions()
        if options.providers and self.providers_here is not None:
            _load_object(self.providers_here)(options.providers)

    def _takes_no(self, what: str, value: str, *, reason: str = "") -> NoReturn:
        raise BackendRefused(
            f"{self.name} takes no {what}{reason}, but was given {value!r}",
            fix="leave it out: there is nothing to set",
            evidence={"operator_details": f"{what}={value}", "validation_output": "nothing can be set"},
        )

    def _among(self, what: str, value: str, allowed: tuple[str, ...]) -> None:
        if not allowed:
            self._takes_no(what, value)
        if value not in allowed:
            raise BackendRefused(
                f"{self.name} does not know {what} {value!r}",
                fix=f"choose from: {', '.join(allowed)}",
                evidence={"operator_details": f"{what}={value}", "validation_output": ", ".join(allowed)},
            )


def _load_object(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


EAGER = InstalledBackend(
    name="eager",
    abilities=abilities(
        float32=YES,
        bfloat16=YES,
        int8=_not_theirs(
            "torch.ao's dynamic linears take one scale for all rows: a neighbour's content would reach a row"
        ),
        dynamic_shapes=YES,
        threads=YES,
        optimization_levels=_never("eager torch rewrites nothing"),
        reproducible_build=YES,
        reproducible_steps=YES,
        batch_invariant=YES,
        own_process=YES,
        one_shot_models=YES,
        onnx_files=_never("eager torch interprets exported programs, and torch reads no ONNX"),
    ),
    libraries=("torch",),
    runtime_libraries=("torch",),
    lowering="runtime.backends.eager_lowering:EagerLowering",
    one_shot_loader="runtime.backends.eager_one_shot:load_eager_one_shot",
    loader="runtime.backends.eager:load_eager",
    flags={RECIPE: RECIPES},
)
ONNXRUNTIME = InstalledBackend(
    name="onnxruntime",
    abilities=abilities(
        float32=YES,
        bfloat16=_not_theirs(
            "ONNX Runtime's CPU provider has no bfloat16 MatMul (NOT_IMPLEMENTED at session creation)"
        ),
        int8=YES,
        dynamic_shapes=YES,
        threads=YES,
        optimization_levels=YES,
        reproducible_build=YES,
        reproducible_steps=YES,
        batch_invariant=YES,
        own_process=YES,
        one_shot_models=YES,
        onnx_files=YES,
    ),
    libraries=("onnxruntime", "onnx", "onnxscript", "torch"),
    runtime_libraries=("onnxruntime",),
    lowering="runtime.backends.onnxruntime_lowering:OrtLowering",
    loader="runtime.backends.onnxruntime_loader:load_onnxruntime",
    one_shot_loader="runtime.backends.onnxruntime_one_shot:load_onnxruntime_one_shot",
    onnx_lowering="runtime.backends.onnx_file_lowering:OnnxFileLowering",
    levels=("default", "disable", "basic", "extended", "layout", "all"),
    flags={
        "disable_prepacking": ("0", "1"),
        "memory_pattern": ("0", "1"),
        "cpu_arena": ("0", "1"),
        "disable_optimizers": NAMES,
        "context": ("resident", "gathered"),
        "products": ("blocked", "plain"),
        RECIPE: ("tile",),
    },
    providers=("CPUExecutionProvider",),
    providers_here="runtime.backends.onnxruntime:check_available",
)
INDUCTOR = InstalledBackend(
    name="inductor",
    abilities=abilities(
        float32=YES,
        bfloat16=YES,
        int8=_not_theirs("torch.export refuses torch.ao's packed linears (LinearPackedParams has no __obj_flatten__)"),
        dynamic_shapes=YES,
        threads=YES,
        optimization_levels=_not_theirs("an ahead-of-time package is always compiled with -O3"),
        reproducible_build=YES,
        reproducible_steps=YES,
        batch_invariant=YES,
        own_process=YES,
        one_shot_models=YES,
        onnx_files=_not_theirs("AOTInductor compiles torch programs, and torch reads no ONNX"),
    ),
    libraries=("torch",),
    runtime_libraries=("torch",),
    lowering="runtime.backends.inductor_lowering:InductorLowering",
    loader="runtime.backends.inductor:load_inductor",
    one_shot_loader="runtime.backends.inductor_one_shot:load_inductor_one_shot",
    can_abort=True,
    flags={
        "freezing": ("false", "true"),
        "simdlen": ("256", "512"),
        "pattern_matcher": ("true", "false"),
        "epilogue_fusion": ("true", "false"),
        "memory_planning": ("false", "true"),
        RECIPE: RECIPES,
    },
)
EXECUTORCH = InstalledBackend(
    name="executorch",
    abilities=abilities(
        float32=YES,
        bfloat16=_not_theirs("XNNPACK's kernels and partitioner know float32 and float16, and no bfloat16"),
        int8=_not_ours("torchao's XNNPACKQuantizer is installed; no quantized decoder yet"),
        dynamic_shapes=YES,
        threads=YES,
        optimization_levels=_never("its passes are fixed; choices are the flags delegate, memory_plan and methods"),
        reproducible_build=YES,
        reproducible_steps=YES,
        batch_invariant=_not_ours("decode batches are invariant by default; padding and chunks need a recipe"),
        own_process=YES,
        one_shot_models=YES,
        onnx_files=_not_theirs("ExecuTorch lowers torch programs, and torch reads no ONNX"),
    ),
    libraries=("executorch", "torch"),
    runtime_libraries=("executorch", "torch"),
    lowering="runtime.backends.executorch_lowering:ExecutorchLowering",
    loader="runtime.backends.executorch:load_executorch",
    one_shot_loader="runtime.backends.executorch_one_shot:load_executorch_one_shot",
    flags={
        "delegate": ("xnnpack", "none"),
        "memory_plan": ("greedy", "naive"),
        "methods": ("split", "single"),
    },
    can_abort=True,
    extra="executorch",
)
IREE = InstalledBackend(
    name="iree",
    abilities=abilities(
        float32=YES,
        bfloat16=_not_ours("llvm-cpu widens bfloat16 to float32 in every kernel; pools are float32"),
        int8=_not_ours("needs a quantized decoder"),
        dynamic_shapes=YES,
        threads=YES,
        optimization_levels=YES,
        reproducible_build=YES,
        reproducible_steps=YES,
        batch_invariant=_not_ours("decode batches are invariant by default; padding and chunks need a recipe"),
        own_process=YES,
        one_shot_models=YES,
        onnx_files=_not_ours("iree-import-onnx exists; its output would need a capture of its own"),
    ),
    libraries=("iree-base-compiler", "iree-base-runtime", "torch"),
    runtime_libraries=("iree-base-runtime",),
    lowering="runtime.backends.iree_lowering:IreeLowering",
    loader="runtime.backends.iree:load_iree",
    one_shot_loader="runtime.backends.iree_one_shot:load_iree_one_shot",
    levels=("default", "O0", "O1", "O2", "O3"),
    flags={
        "target_cpu": ("host", "generic", "x86-64-v3", "x86-64-v4"),
        "data_tiling": ("false", "true"),
        "ukernels": ("none", "all"),
    },
    buckets="optional",
    can_abort=True,
    extra="iree",
)
XLA = InstalledBackend(
    name="xla",
    abilities=abilities(
        float32=YES,
        bfloat16=YES,
        int8=_not_ours("StableHLO has integer products; the bridge takes no quantized operators yet"),
        dynamic_shapes=_never("XLA's CPU compiler makes one executable a shape; calls run in declared buckets"),
        threads=YES,
        optimization_levels=YES,
        reproducible_build=YES,
        reproducible_steps=YES,
        batch_invariant=_not_ours(
            "kernels are chosen a bucket; a plan of one bucket a kind has yet to be offered as one"
        ),
        own_process=_not_ours("executables read pools of the plan's size; a hosted pool has the size asked for"),
        one_shot_models=YES,
        onnx_files=_not_theirs("jax imports no ONNX"),
    ),
    libraries=("jax", "jaxlib", "torch"),
    runtime_libraries=("jax", "jaxlib"),
    lowering="runtime.backends.xla_lowering:XlaLowering",
    loader="runtime.backends.xla:load_xla",
    one_shot_loader="runtime.backends.xla_one_shot:load_xla_one_shot",
    levels=("default", "o0", "o1", "o2", "o3"),
    flags={
        "specialization": ("ahead", "lazy"),
        "max_specializations": ("1", "2", "4", "8", "16", "32", "64"),
        "compile_concurrency": ("1", "2", "4"),
        "on_limit": ("refuse", "evict"),
        "fast_math": ("false", "true"),
        "disabled_passes": ("none", "algsimp", "fusion", "algsimp,fusion"),
    },
    buckets="needed",
    extra="xla",
)
BACKENDS: tuple[InstalledBackend, ...] = (EAGER, ONNXRUNTIME, INDUCTOR, EXECUTORCH, IREE, XLA)


def backend_named(name: str) -> Backend:
    """Find a backend; an unknown name is refused with the known ones."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise BackendRefused(
        f"no backend is called {name!r}",
        fix=f"choose from: {', '.join(backend.name for backend in BACKENDS)}",
        evidence={"operator_details": name},
    )
