"""How does the functional step run in IREE?  A module on a local device over NumPy pools that it reads in place."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import iree.runtime
import iree.runtime._binding as binding
import numpy as np
from numpy.typing import NDArray

from runtime.backends.buckets import Bucket, step_in_buckets
from runtime.backends.errors import BackendRefused
from runtime.backends.executor import LoadedExecutor, StepInputs
from runtime.backends.pool import ALIGNMENT, ArrayPool, foreign_pool
from runtime.backends.protocol import KVPool, LoadSpec, StepOutput

MODULE = "step.vmfb"
FUNCTION = "main"
"""Name of the exported function where the shapes are dynamic; a package of buckets has one function a bucket."""
MAKING = Lock()
READ_IN_PLACE = int(iree.runtime.BufferUsage.DEFAULT | iree.runtime.BufferUsage.MAPPING)
HOST_MEMORY = int(iree.runtime.MemoryType.DEVICE_LOCAL | iree.runtime.MemoryType.HOST_VISIBLE)
ELEMENTS: Mapping[str, Any] = {
    "float32": iree.runtime.HalElementType.FLOAT_32,
    "float64": iree.runtime.HalElementType.FLOAT_64,
    "float16": iree.runtime.HalElementType.FLOAT_16,
    "int64": iree.runtime.HalElementType.SINT_64,
    "int32": iree.runtime.HalElementType.SINT_32,
    "int16": iree.runtime.HalElementType.SINT_16,
    "int8": iree.runtime.HalElementType.SINT_8,
    "uint8": iree.runtime.HalElementType.UINT_8,
    "bool": iree.runtime.HalElementType.BOOL_8,
}
"""IREE's element type of each NumPy dtype."""


@dataclass
class LoadedModule:
    """A module in its own context: nothing is shared with another package."""

    device: Any
    context: Any
    module: Any

    def view(self, array: NDArray[Any]) -> Any:
        """Let the device read an array where it lies, or a copy of it where it is not aligned for compiled code.

        IREE takes any address and crashes at the first aligned load, so the alignment is checked here.  The view does
        not keep the array alive, whatever the library's documentation says: whoever makes the view holds the array.
        """
        element, allocator = ELEMENTS[str(array.dtype)], self.device.allocator
        if not array.flags.c_contiguous or array.ctypes.data % ALIGNMENT:
            return allocator.allocate_buffer_copy(HOST_MEMORY, READ_IN_PLACE, self.device, array, element)
        buffer = allocator.import_host_allocation(array, HOST_MEMORY, READ_IN_PLACE)
        return iree.runtime.HalBufferView(buffer, list(array.shape), int(element))

    def call(self, function: str, views: list[Any]) -> list[NDArray[Any]]:
        """Run a function on device views; the arrays returned are copies.

        A mapped output does not keep its memory: another call would write into the answer of this one.
        """
        arguments = iree.runtime.VmVariantList(len(views))
        for view in views:
            arguments.push_ref(view)
        results = iree.runtime.VmVariantList(8)
        self.context.invoke(self.module.lookup_function(function), arguments, results)
        found: list[NDArray[Any]] = []
        for index in range(len(results)):
            view = results.get_as_object(index, iree.runtime.HalBufferView)
            held = iree.runtime.DeviceArray(self.device, view)
            found.append(np.array(held.to_host()))
        return found

    def statistics(self) -> dict[str, int]:
        """Read what the device's allocator counted, in bytes."""
        return {name: int(value) for name, value in self.device.allocator.statistics.items()}


class IreePool(ArrayPool):
    """NumPy tables that the device reads in place."""

    def __init__(self, loaded: LoadedModule, *, num_layers: int, num_slots: int, width: int) -> None:
        super().__init__(num_layers=num_layers, num_slots=num_slots, width=width)
        self.device, self._loaded = loaded.device, loaded
        self._view()

    def adopt(self, k: NDArray[Any], v: NDArray[Any]) -> None:
        """See `ArrayPool.adopt`."""
        super().adopt(k, v)
        self._view()

    def _view(self) -> None:
        self.k_view, self.v_view = (self._loaded.view(_importable(table)) for table in (self.k, self.v))


def _importable(array: NDArray[Any]) -> NDArray[Any]:
    """See a read-only table as one that IREE imports; it only reads it, and memory that may not be written stays so."""
    if array.flags.writeable:
        return array
    raw: Any = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
    return np.frombuffer(raw, dtype=array.dtype).reshape(array.shape)


class IreeExecutor(LoadedExecutor[LoadedModule]):
    """One module; a bad index in it would end the process, so inputs are checked before every call."""

    backend = "iree"
    failures = (RuntimeError, ValueError)

    def device_memory(self) -> dict[str, int]:
        """Read the counters of the device's allocator; every package on as many threads shares the device."""
        return self.loaded.statistics()

    def new_pool(self, num_slots: int) -> IreePool:
        """Allocate a zeroed float32 pool."""
        config = self.config
        return IreePool(self.loaded, num_layers=config.num_layers, num_slots=num_slots, width=config.kv_width)

    def run(self, loaded: LoadedModule, inputs: StepInputs, pool: KVPool) -> StepOutput:
        """Call the module's function, or that of the bucket that covers the call."""
        shape = (self.config.num_layers * pool.num_slots, self.config.kv_width)
        if not isinstance(pool, IreePool) or pool.device is not loaded.device or pool.k.shape != shape:
            raise foreign_pool(pool)

        def call(function: str, values: StepInputs) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
            tokens, positions, slots, lengths = map(loaded.view, values)
            out = loaded.call(function, [tokens, positions, pool.k_view, pool.v_view, slots, lengths])
            return out[0], out[1], out[2]

        def call_bucket(bucket: Bucket, values: StepInputs) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
            return call(bucket.name, values)

        if self.spec.buckets is None:
            return StepOutput(*call(FUNCTION, inputs))
        return StepOutput(*step_in_buckets(self.spec.buckets, inputs, call_bucket))


@cache
def device_of(threads: int) -> Any:
    """Give this process's device with that many compute threads.

    One thread needs no workers: `local-sync` computes in the caller's.  The workers of `local-task` are those that a
    process-wide flag names when its driver is made, and the library keeps its drivers; so every number of threads gets
    a driver of its own.  Devices are never released: a buffer that outlives its device, such as an output that somebody
    still holds, would end the process.
    """
    if threads == 1:
        return iree.runtime.get_device("local-sync", cache=False)
    with MAKING:
        iree.runtime.flags.parse_flags(f"--task_topology_group_count={threads}")
        native: Any = binding  # its typed surface lacks the one call that makes a driver of one's own
        return native.create_hal_driver("local-task").create_default_device()


def open_module(path: Path, *, threads: int) -> LoadedModule:
    """Map a module file and make a device for it; `BackendRefused` where IREE cannot load it here."""
    try:
        device = device_of(threads)
        instance = iree.runtime.VmInstance()
        hal = iree.runtime.create_hal_module(instance, device)
        module = iree.runtime.VmModule.mmap(instance, str(path))
        return LoadedModule(device, iree.runtime.VmContext(instance, [hal, module]), module)
    except Exception as error:  # RuntimeError, ValueError and OSError by the kind of fault
        text = str(error).strip().splitlines()
        first = text[0][:500] if text else type(error).__name__
        raise BackendRefused(
            f"IREE cannot load the module: {first}",
            fix="prepare the model again on this machine",
            evidence={"provider_log": " ".join(text)[:1000], "exception": type(error).__name__},
        ) from error


def load_iree(package: Path, spec: LoadSpec) -> IreeExecutor:
    """Load `step.vmfb` of a verified package folder and see that it has every function that the manifest promises."""
    loaded = open_module(package / MODULE, threads=spec.threads)
    wanted = [FUNCTION] if spec.buckets is None else [bucket.name for bucket in spec.buckets.buckets()]
    missing = sorted(set(wanted) - set(loaded.module.function_names))
    if missing:
        raise BackendRefused(
            f"the module lacks the functions {', '.join(missing)}",
            fix="prepare the model again",
            evidence={"validation_output": f"functions {', '.join(loaded.module.function_names)}"},
        )
    return IreeExecutor(loaded, spec)
