"""How does the functional step run in XLA?  One executable a bucket, over torch pools that XLA reads in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from manifests.canonical import digest
from runtime.backends.buckets import Arrays, Bucket, BucketPlan, Inputs, step_in_buckets
from runtime.backends.contract import StepInputs
from runtime.backends.errors import BackendRefused, CapacityExhausted, InputRefused
from runtime.backends.executor import LoadedExecutor
from runtime.backends.pool import TorchPool, foreign_pool
from runtime.backends.protocol import CompileEvent, KVPool, LoadSpec, StepOutput
from runtime.backends.xla_executable import compile_shapes, deserialize
from runtime.backends.xla_platform import FLAGS, client
from runtime.backends.xla_program import PortableProgram, shape_of
from runtime.backends.xla_specializations import FixedSizes, Shape, Specializations
from runtime.models.config import ModelConfig
from runtime.models.decoder import PRECISIONS

PROGRAM, DOCUMENT, WEIGHTS = "step.stablehlo", "step.json", "weights.safetensors"
EXECUTABLE = "bucket.{}.xla"
"""File name of a bucket's executable in a package."""
AHEAD, LAZY = "ahead", "lazy"
DEFAULTS = {"specialization": AHEAD, "max_specializations": "16", "compile_concurrency": "1", "on_limit": "refuse"}
DEFAULT_LEVEL = "o3"
LEVEL = "level"
"""The compiler manifest's flag that holds the level, for what is compiled after loading."""


def compile_options(level: str, flags: Mapping[str, str]) -> dict[str, Any]:
    """Write optimization level and flags as XLA's compile options."""
    options: dict[str, Any] = {"xla_backend_optimization_level": int(level.removeprefix("o"))}
    if flags.get("fast_math", "false") == "true":
        options["xla_cpu_enable_fast_math"] = True
    if flags.get("disabled_passes", "none") != "none":
        options["xla_disable_hlo_passes"] = flags["disabled_passes"]
    return options


def symbol_values(bucket: Bucket, pool: int) -> dict[str, int]:
    """Give each symbol of the functional step its value in a bucket."""
    return {"B": bucket.batch, "T": bucket.tokens, "S": bucket.context, "P": pool}


class XlaPool(TorchPool):
    """Torch tables as large as the executables were compiled for; fewer slots may be in use."""

    def __init__(self, config: ModelConfig, *, num_slots: int, capacity: int, dtype: torch.dtype) -> None:
        if num_slots > capacity:
            raise CapacityExhausted(
                f"the package's executables were made for pools of {capacity} slots a layer, {num_slots} were asked",
                fix=f"lower num_blocks, or prepare the package with buckets that say pool={num_slots}",
                evidence={"reservation_failure": f"{num_slots} slots of {capacity}", "requested_slots": num_slots},
            )
        super().__init__(num_layers=config.num_layers, num_slots=capacity, width=config.kv_width, dtype=dtype)
        import jax.dlpack

        if num_slots < 1:
            raise InputRefused(f"a pool needs at least one slot, not {num_slots}", evidence={"num_slots": num_slots})
        self._used = num_slots
        self.k_array, self.v_array = jax.dlpack.from_dlpack(self.k), jax.dlpack.from_dlpack(self.v)
        if self.k_array.unsafe_buffer_pointer() != self.k.data_ptr():
            raise BackendRefused("JAX copied the key-value pool instead of reading it in place", fix="use jax 0.10")

    @property
    def num_slots(self) -> int:
        """Slots of one layer that may be used."""
        return self._used


class XlaProgram:
    """Weights and executables of a package, in XLA's hands."""

    def __init__(self, weights: Sequence[Any], specializations: Specializations[Any]) -> None:
        self.weights, self.specializations = list(weights), specializations

    def call(self, bucket: FixedSizes, inputs: Sequence[Any]) -> list[Any]:
        """Run one bucket on its inputs, NumPy or JAX; returns host arrays that are nobody else's."""
        import jax

        given = [jax.device_put(entry) if isinstance(entry, np.ndarray) else entry for entry in inputs]
        outputs = self.specializations.get(bucket).execute([*self.weights, *given])
        # Copied before anything may write to the pool again: an output could still be computing from it.
        return [np.array(entry) for entry in outputs]


class XlaExecutor(LoadedExecutor[XlaProgram]):
    """The functional step in compiled buckets; calls are padded up to one and cut back."""

    backend = "xla"

    @property
    def plan(self) -> BucketPlan:
        """The buckets of the package."""
        if self.spec.buckets is None:
            raise BackendRefused("the package declares no buckets", fix="prepare the model again")
        return self.spec.buckets

    def new_pool(self, num_slots: int) -> XlaPool:
        """Allocate the zeroed tables that the executables read; `CapacityExhausted` beyond the plan's pool."""
        return XlaPool(self.config, num_slots=num_slots, capacity=self.plan.pool, dtype=PRECISIONS[self.precision])

    def run(self, loaded: XlaProgram, inputs: StepInputs, pool: KVPool) -> StepOutput:
        """Run the step in the smallest bucket that covers it."""
        if not isinstance(pool, XlaPool) or tuple(pool.k.shape) != self._table or pool.k.dtype is not self._dtype:
            raise foreign_pool(pool)
        k_array, v_array = pool.k_array, pool.v_array

        def in_bucket(bucket: Bucket, given: Inputs) -> Arrays:
            tokens, positions, slots, lengths = given
            logits, new_k, new_v = loaded.call(bucket, (tokens, positions, k_array, v_array, slots, lengths))
            return logits, new_k, new_v

        logits, new_k, new_v = step_in_buckets(self.plan, inputs, in_bucket)
        return StepOutput(logits, as_torch(new_k), as_torch(new_v))

    def compile_events(self) -> tuple[CompileEvent, ...]:
        """Give every bucket compiled since the load."""
        return self.loaded.specializations.events()

    def compiles_lazily(self) -> bool:
        """Say whether buckets are compiled at first use."""
        return self.spec.flags.get("specialization", AHEAD) == LAZY

    @property
    def _table(self) -> tuple[int, int]:
        return self.config.num_layers * self.plan.pool, self.config.kv_width

    @property
    def _dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


def as_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """View a NumPy array as a tensor; NumPy's bfloat16 is an extension that torch does not know."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def load_xla(package: Path, spec: LoadSpec) -> XlaExecutor:
    """Load a verified package folder: weights, and either all executables or the program to compile them from."""
    if spec.buckets is None:
        raise BackendRefused("the package declares no buckets", fix="prepare the model again")
    pool = spec.buckets.pool

    def values(bucket: Bucket) -> dict[str, int]:
        return symbol_values(bucket, pool)

    program = load_program(package, spec.flags, ahead=spec.buckets.buckets(), values=values, threads=spec.threads)
    return XlaExecutor(program, spec)


def load_program(
    package: Path,
    flags: Mapping[str, str],
    *,
    ahead: Sequence[Shape],
    values: Callable[[Shape], Mapping[str, int]],
    threads: int,
) -> XlaProgram:
    """Load the files of a package: the executables of `ahead`, and what compiles others where it may.

    values: gives every symbol's value in a shape.
    """
    made = client(threads)
    portable = PortableProgram.read((package / PROGRAM).read_bytes(), (package / DOCUMENT).read_text())
    weights = load_weights(package / WEIGHTS, portable)
    options = compile_options(flags.get(LEVEL, DEFAULT_LEVEL), flags)
    chosen = {**DEFAULTS, **flags}
    lazily = chosen["specialization"] == LAZY
    held = [shape_of(tuple(entry.shape), str(entry.dtype)) for entry in weights]

    def compile_bucket(bucket: Shape) -> Any:
        return compile_shapes(portable, values(bucket), held, options).executable

    ready: dict[Shape, Any] = {}
    if not lazily:
        for bucket in ahead:
            ready[bucket] = deserialize(made, (package / EXECUTABLE.format(bucket.name)).read_bytes())
    specializations = Specializations(
        ready,
        compile_bucket=compile_bucket if lazily else None,
        cache_key=partial(_cache_key, digest(portable.blob), str(options), threads),
        limit=int(chosen["max_specializations"]) if lazily else len(ready),
        concurrency=int(chosen["compile_concurrency"]),
        evict=chosen["on_limit"] == "evict",
    )
    return XlaProgram(weights, specializations)


def load_weights(path: Path, program: PortableProgram) -> list[Any]:
    """Hand the stored tensors to JAX in the order of the program's arguments."""
    import jax.dlpack

    try:
        tensors = load_file(path)
        return [jax.dlpack.from_dlpack(tensors[name]) for name in program.held]
    except (SafetensorError, OSError, KeyError) as error:
        raise BackendRefused(
            f"the package's weights do not fit its program: {error}", fix="prepare the model again"
        ) from error


def _cache_key(program: str, options: str, threads: int, bucket: FixedSizes) -> str:
    return digest(
        {
            "program": program,
            "shape": bucket.name,
            "options": options,
            "threads": threads,
            "jaxlib": version("jaxlib"),
            "environment": os.environ.get(FLAGS, ""),
        }
    )
