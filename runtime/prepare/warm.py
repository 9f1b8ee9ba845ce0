"""Stage 9: does the loaded package answer as it should, how fast, and what do its bits depend on?"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from runtime.backends.comparison import Comparison
from runtime.backends.fixture import FixtureOutput, compare, fixture_tokens, run_fixture
from runtime.backends.protocol import BuildOptions, CompileEvent, Executor, Specializing
from runtime.prepare.errors import WarmupRefused
from runtime.prepare.invariance import AXES, probe_invariance
from runtime.prepare.kernels import varying_kernels
from runtime.prepare.load import Loaded, LoadedModel
from runtime.prepare.one_shot import (
    OneShotPackage,
    batch_sizes,
    measure_one_shot,
    probe_rows,
    validate_one_shot,
)
from runtime.prepare.package import FIXTURES
from runtime.prepare.stage import StageOutcome
from runtime.prepare.store import PackageStore

BUCKETS = (1, 8, 32)
CONTEXT, RUNS = 64, 9


@dataclass(frozen=True)
class Warmed:
    """Emits: a ready execution path with validated output behaviour and a baseline."""

    model: LoadedModel | OneShotPackage
    outputs: Mapping[str, str]
    """Digest of what each call of the fixture answered, on this backend."""
    invariance: Mapping[str, Any]
    ready: bool

    def document(self) -> Mapping[str, Any]:
        """Describe behaviour, not latency."""
        return {
            "package": self.model.digest,
            "outputs": dict(self.outputs),
            "invariance": dict(self.invariance),
            "ready": self.ready,
        }


@dataclass(frozen=True, kw_only=True)
class Observed:
    """How a loaded package behaved."""

    outputs: Mapping[str, str]
    comparison: Comparison
    runs: int
    """Calls that the fixture took."""
    first_us: int
    latency: Mapping[str, Mapping[str, int]]
    invariance: Mapping[str, Any]
    kernels: Mapping[str, str]
    """Kernels by which a row's bits depend on its batch, where they are known."""


def run(received: Loaded, *, store: PackageStore) -> StageOutcome[Warmed]:
    """Validate against the fixtures, measure, probe, decide readiness and keep the baseline."""
    model = received.model
    compiled_before, earlier = compilations(), compile_events(model)
    seen = _observe_one_shot(model, store) if isinstance(model, OneShotPackage) else _observe(received, model, store)
    check_health(model.digest, seen.latency, received.packaged.source.options)
    events, late = compile_events(model)[len(earlier) :], lazy(model)
    compiled = compilations() - compiled_before
    warmed = Warmed(model, seen.outputs, seen.invariance, ready=compiled == (len(events) if late else 0))
    if not warmed.ready:
        raise WarmupRefused(
            f"{compiled} graphs were compiled while warming: the package is not ahead-of-time code",
            fix="prepare the model again",
            evidence={"artifact_digest": model.digest, "validation_output": f"compilations {compiled}"},
            stage="a09",
        )
    record = {
        "warmup_count": seen.runs + len(seen.latency["steady_us"]) * (RUNS + 1),
        "first_run_us": {"fixture_session": seen.first_us, **seen.latency["first_us"]},
        "steady_state_us": {**seen.latency["steady_us"], "spread_percent": seen.latency["spread_percent"]},
        "compilation_cache_events": {
            "compilations": compiled,
            "ready_state": "compiles a shape at its first use" if late else "compiles nothing",
            "specializations": [event.document() for event in events],
        },
        "output_comparison": seen.comparison.document(),
        "readiness_decision": {"ready": True, "invariance": seen.invariance, "varying_kernels": seen.kernels},
    }
    return StageOutcome(warmed, record)


def _observe(received: Loaded, model: LoadedModel, store: PackageStore) -> Observed:
    start = time.perf_counter_ns()
    output, comparison = validate(model, store)
    first_us = (time.perf_counter_ns() - start) // 1000
    latency = measure_latency(model.executor)
    invariance = probe_invariance(model.executor)
    kernels = varying_kernels(model.compiler, received.packaged.manifest.stages[5].record["kernel_inventory"])
    check_invariance(model, invariance, kernels)
    return Observed(
        outputs=output.digests(),
        comparison=comparison,
        runs=len(output.names),
        first_us=first_us,
        latency=latency,
        invariance=invariance,
        kernels=kernels,
    )


def _observe_one_shot(model: OneShotPackage, store: PackageStore) -> Observed:
    start = time.perf_counter_ns()
    outputs, comparison = validate_one_shot(model, store)
    return Observed(
        outputs=outputs,
        comparison=comparison,
        runs=len(batch_sizes(model.contract)),
        first_us=(time.perf_counter_ns() - start) // 1000,
        latency=measure_one_shot(model.executor),
        invariance=probe_rows(model.executor),
        kernels={},
    )


def check_health(digest: str, latency: Mapping[str, Mapping[str, int]], options: BuildOptions) -> None:
    """Refuse unstable or slow steps where the options set a limit; without one, noise never fails a preparation."""
    limits = {
        "spread_percent": (options.steady_spread_percent, max(latency["spread_percent"].values())),
        "steady_us": (options.steady_step_us, min(latency["steady_us"].values())),
    }
    for name, (limit, found) in limits.items():
        if limit is not None and found > limit:
            raise WarmupRefused(
                f"steady steps are not healthy: {name} {found}, allowed is {limit}",
                fix="prepare again on a quieter machine, or raise the limit",
                evidence={
                    "artifact_digest": digest,
                    "validation_output": f"{name} {found} > {limit}",
                    "operator_details": str({part: dict(values) for part, values in latency.items()}),
                },
                stage="a09",
            )


def check_invariance(model: LoadedModel, invariance: Mapping[str, Any], kernels: Mapping[str, str]) -> None:
    """Refuse a package that was asked to be batch-invariant and is not, or on a machine where that cannot be seen."""
    if not model.compiler.batch_invariant:
        return
    varying = [axis for axis in AXES if invariance[axis] != "equal"]
    blind = invariance["control"] != "differs"
    if varying or blind:
        found = ", ".join(f"{axis} ({invariance['rows'].get(axis, 'not tried')})" for axis in varying)
        raise WarmupRefused(
            f"bits of the batch-invariant package depend on: {found}"
            if varying
            else "the probe shows no difference even where one is known: invariance cannot be told on this machine",
            fix="prepare without the flags that select other kernels, or without batch_invariant"
            if varying
            else "prepare without batch_invariant",
            evidence={
                "artifact_digest": model.digest,
                "validation_output": f"{dict(invariance)}",
                "operator_details": ", ".join(kernels) or "none known",
            },
            stage="a09",
        )


def validate(model: LoadedModel, store: PackageStore) -> tuple[FixtureOutput, Comparison]:
    """Run the fixture session and hold it against the package's reference outputs.

    Errors: `WarmupRefused` when the difference is beyond the stated tolerance; `ExecutionFailed` when values are not
    finite.
    """
    arrays = load_file(store.path(model.digest) / FIXTURES)
    output = run_fixture(model.executor)
    reference = FixtureOutput(names=output.names, logits=tuple(arrays[name] for name in output.names))
    comparison = compare(output, reference, model.executor.precision)
    if not comparison.within:
        raise WarmupRefused(
            f"the loaded package is {comparison.relative_rms:.2e} from eager float32 in relative root mean square, "
            f"allowed is {comparison.tolerance:g}",
            fix="lower the optimization level, or prepare the model again",
            evidence={"artifact_digest": model.digest, "validation_output": str(comparison.document())},
            stage="a09",
        )
    return output, comparison


def measure_latency(executor: Executor) -> dict[str, dict[str, int]]:
    """Time one decode step at each batch size: the first run, the median of later ones, in microseconds, their spread.

    The spread is that of all later runs but the slowest, in percent of the median.
    """
    bounds = executor.contract.bounds
    context = min(CONTEXT, bounds.max_context, executor.contract.max_positions - 1)
    first: dict[str, int] = {}
    steady: dict[str, int] = {}
    spread: dict[str, int] = {}
    pool = executor.new_pool(context)
    for batch in (size for size in BUCKETS if size <= bounds.max_batch):
        tokens = fixture_tokens("latency", batch, executor.config.vocab_size).reshape(batch, 1)
        positions = np.full((batch, 1), context, dtype=np.int64)
        slots = np.tile(np.arange(context, dtype=np.int64), (batch, 1))
        lengths = np.full(batch, context, dtype=np.int64)
        times: list[int] = []
        for _ in range(RUNS + 1):
            start = time.perf_counter_ns()
            executor.step(tokens, positions, slots, lengths, pool)
            times.append(time.perf_counter_ns() - start)
        later = sorted(times[1:])
        first[f"decode_b{batch}"] = times[0] // 1000
        steady[f"decode_b{batch}"] = later[RUNS // 2] // 1000
        spread[f"decode_b{batch}"] = -(-100 * (later[-2] - later[0]) // later[RUNS // 2])
    return {"first_us": first, "steady_us": steady, "spread_percent": spread}


def compilations() -> int:
    """Count what torch and XLA compiled in this process; 0 where neither compiler was ever imported."""
    utilities = sys.modules.get("torch._dynamo.utils")
    graphs = len(utilities.get_compilation_metrics()) if utilities is not None else 0
    platform = sys.modules.get("runtime.backends.xla_platform")
    return graphs + (platform.compile_counter().count if platform is not None else 0)


def compile_events(model: LoadedModel | OneShotPackage) -> tuple[CompileEvent, ...]:
    """Give what a package compiled since its load; nothing where it cannot compile."""
    return model.executor.compile_events() if isinstance(model.executor, Specializing) else ()


def lazy(model: LoadedModel | OneShotPackage) -> bool:
    """Say whether the package was prepared to compile shapes at their first use."""
    return isinstance(model.executor, Specializing) and model.executor.compiles_lazily()
