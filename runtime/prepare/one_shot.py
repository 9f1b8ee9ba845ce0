"""How is a one-shot model packaged, loaded and warmed?  What stages 7, 8 and 9 do where one call answers a request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from manifests.artifact import ArtifactManifest
from manifests.compiler import CompilerManifest
from runtime.backends.comparison import Comparison
from runtime.backends.one_shot import (
    OneShotExecutor,
    OneShotModel,
    OneShotSpec,
    array_digest,
    compare_outputs,
    fixture_inputs,
    output_digests,
    typical_sizes,
)
from runtime.backends.registry import backend_named
from runtime.backends.tensor_contract import Arrays, TensorContract
from runtime.prepare.capture import Source
from runtime.prepare.contents import FIXTURES, PackageContents
from runtime.prepare.errors import PackageRefused, WarmupRefused
from runtime.prepare.manifest import PackageManifest
from runtime.prepare.store import PackageStore

BATCHES = (1, 8, 32)
RUNS = 9
INPUT, OUTPUT = "in", "out"


@dataclass(frozen=True)
class OneShotPackage:
    """A verified one-shot package, ready to run."""

    digest: str
    executor: OneShotExecutor
    manifest: PackageManifest
    artifact: ArtifactManifest
    """With the package's digest filled in."""
    compiler: CompilerManifest

    @property
    def contract(self) -> TensorContract:
        """What a call's inputs must satisfy."""
        return self.executor.contract


def is_one_shot(manifest: PackageManifest) -> bool:
    """Whether one call of the package answers a request whole."""
    return manifest.contract.get("kind") == "one_shot"


def one_shot_contents(source: Source, model: OneShotModel) -> PackageContents:
    """Run the reference on the fixture and keep its inputs and outputs beside the model."""
    arrays: dict[str, NDArray[Any]] = {}
    outputs: dict[str, Arrays] = {}
    for case in model.cases():
        outputs[case.name] = model.expected(case)
        for place, values in ((INPUT, case.inputs), (OUTPUT, outputs[case.name])):
            for name, value in values.items():
                arrays[f"{place}.{case.name}.{name}"] = np.ascontiguousarray(value)
    path = source.work / FIXTURES
    save_file(arrays, path)
    return PackageContents(
        files={FIXTURES: path},
        artifact=ArtifactManifest(
            model=model.name,
            family=model.kind.value,
            model_digest=model.digest,
            quantization="none" if model.precision == "float32" else model.precision,
        ),
        config={"kind": "one_shot", "source": model.kind.value},
        contract=model.contract.document(),
        fixture={
            "reference": model.reference_name(),
            "tolerance": f"{model.tolerance:g}",
            "outputs": output_digests(outputs),
        },
    )


def load_verified(store: PackageStore, digest: str, manifest: PackageManifest, *, threads: int) -> OneShotPackage:
    """Load a package whose digests, signature and envelope have been checked.

    Errors: `PackageRefused` for a decoder's package; `BackendError`.
    """
    if not is_one_shot(manifest):
        raise PackageRefused(
            f"package {digest[:19]} is a decoder, which does not answer in one call",
            fix="serve it with `replaylab serve`",
            evidence={"artifact_digest": digest, "operator_details": manifest.artifact.family},
            stage="a08",
        )
    spec = OneShotSpec(
        contract=TensorContract.from_document(manifest.contract),
        precision=manifest.compiler.precision,
        flags=dict(manifest.compiler.flags),
        providers=manifest.compiler.execution_providers,
        threads=threads,
    )
    return OneShotPackage(
        digest=digest,
        executor=backend_named(manifest.compiler.backend).load_one_shot(store.path(digest), spec),
        manifest=manifest,
        artifact=manifest.artifact.model_copy(update={"package_digest": digest}),
        compiler=manifest.compiler,
    )


def validate_one_shot(model: OneShotPackage, store: PackageStore) -> tuple[dict[str, str], Comparison]:
    """Run the packaged fixture and hold the answers against the packaged reference outputs.

    Returns the digest of each output on this backend, and the comparison.
    Errors: `WarmupRefused` when the difference is beyond the stated tolerance.
    """
    stored: dict[str, dict[str, dict[str, NDArray[Any]]]] = {INPUT: {}, OUTPUT: {}}
    for key, value in load_file(store.path(model.digest) / FIXTURES).items():
        place, case, name = key.split(".", 2)
        stored[place].setdefault(case, {})[name] = value
    ours = {case: model.executor.run(inputs) for case, inputs in sorted(stored[INPUT].items())}
    fixture = model.manifest.fixture
    comparison = compare_outputs(
        ours, stored[OUTPUT], tolerance=float(fixture["tolerance"]), reference=fixture["reference"]
    )
    if not comparison.within:
        raise WarmupRefused(
            f"the loaded package is {comparison.relative_rms:.2e} from {comparison.reference} in relative root mean "
            f"square, allowed is {comparison.tolerance:g}",
            fix="lower the optimization level, or prepare the model again",
            evidence={"artifact_digest": model.digest, "validation_output": str(comparison.document())},
            stage="a09",
        )
    return output_digests(ours), comparison


def measure_one_shot(executor: OneShotExecutor) -> dict[str, dict[str, int]]:
    """Time a call at each batch size: the first run and the median of later ones, in microseconds."""
    contract = executor.contract
    first: dict[str, int] = {}
    steady: dict[str, int] = {}
    spread: dict[str, int] = {}
    for batch in batch_sizes(contract):
        inputs = batch_inputs(contract, batch, label="latency")
        times: list[int] = []
        for _ in range(RUNS + 1):
            start = time.perf_counter_ns()
            executor.run(inputs)
            times.append(time.perf_counter_ns() - start)
        later = sorted(times[1:])
        first[f"run_b{batch}"] = times[0] // 1000
        steady[f"run_b{batch}"] = later[RUNS // 2] // 1000
        spread[f"run_b{batch}"] = -(-100 * (later[-2] - later[0]) // later[RUNS // 2])
    return {"first_us": first, "steady_us": steady, "spread_percent": spread}


def probe_rows(executor: OneShotExecutor) -> dict[str, str]:
    """On what do a row's bits depend?  `repeat`: the same call again; `batch`: the row alone or among others."""
    contract = executor.contract
    sizes = batch_sizes(contract)
    inputs = batch_inputs(contract, sizes[-1], label="rows")
    whole, again = executor.run(inputs), executor.run(inputs)
    found = {"repeat": "equal" if _digests(whole) == _digests(again) else "differs"}
    if contract.batch is None or len(sizes) < 2:
        return {**found, "batch": "not tried"}
    alone = executor.run({name: value[: sizes[0]] for name, value in inputs.items()})
    cut = {name: value[: sizes[0]] for name, value in whole.items()}
    return {**found, "batch": "equal" if _digests(alone) == _digests(cut) else "differs"}


def batch_sizes(contract: TensorContract) -> tuple[int, ...]:
    """The batch sizes to measure, as far as the contract admits them; 1 where no dimension is the batch."""
    if contract.batch is None:
        return (1,)
    low, high = contract.symbols[contract.batch]
    return tuple(sorted({min(high, max(low, size)) for size in BATCHES}))


def batch_inputs(contract: TensorContract, batch: int, *, label: str) -> dict[str, NDArray[Any]]:
    """Make inputs of a batch size, every other dimension at its usual size."""
    sizes = typical_sizes(contract)
    if contract.batch is not None:
        sizes[contract.batch] = batch
    return fixture_inputs(contract, sizes, label=label)


def _digests(outputs: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    return {name: array_digest(value) for name, value in outputs.items()}
