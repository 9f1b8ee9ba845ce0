"""What is alike in backends that read torch tensors?  Their pool, the six input tensors, the pinned threads."""

from __future__ import annotations

import torch

from runtime.backends.contract import Integers
from runtime.backends.executor import Loaded, LoadedExecutor, StepInputs
from runtime.backends.pool import TorchPool, torch_pool
from runtime.backends.protocol import KVPool
from runtime.models.decoder import PRECISIONS


class TorchExecutor(LoadedExecutor[Loaded]):
    """A loaded package whose step takes torch tensors."""

    def new_pool(self, num_slots: int) -> TorchPool:
        """Allocate a zeroed pool in the working precision."""
        return TorchPool(
            num_layers=self.config.num_layers,
            num_slots=num_slots,
            width=self.config.kv_width,
            dtype=PRECISIONS[self.precision],
        )

    def tensors(self, inputs: StepInputs, pool: KVPool) -> tuple[torch.Tensor, ...]:
        """View the inputs and the pool's tables as the step's six tensors, in its order; nothing large is copied."""
        tokens, positions, slots, context_lengths = map(as_tensor, inputs)
        tables = torch_pool(pool, self.config, self.precision)
        return tokens, positions, tables.k, tables.v, slots, context_lengths


def as_tensor(array: Integers) -> torch.Tensor:
    """View an array as a tensor; strided or read-only arrays are copied first, since torch cannot view them safely."""
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = array.copy()
    return torch.from_numpy(array)


def hold_threads(threads: int) -> None:
    """Keep torch at the pinned number of threads; it is process-wide, so another executor may have moved it."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
