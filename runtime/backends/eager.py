"""How does the functional step run in eager torch?  The reference that the other backends are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from runtime.backends.contract import Bounds, InputContract, Integers
from runtime.backends.errors import BackendRefused, classify_execution
from runtime.backends.pool import TorchPool, torch_pool
from runtime.backends.protocol import KVPool, LoadSpec, StepOutput
from runtime.models.config import ModelConfig
from runtime.models.decoder import PRECISIONS, Decoder, NormKind
from runtime.models.loader import build_decoder, load_checkpoint

WEIGHTS = "weights.safetensors"


class EagerExecutor:
    """The decoder module itself, called without gradients."""

    backend = "eager"

    def __init__(self, decoder: Decoder, *, precision: str, contract: InputContract, threads: int = 1) -> None:
        self._decoder: Decoder | None = decoder
        self._config, self._precision = decoder.config, precision
        self._contract, self._threads = contract, threads

    @classmethod
    def from_checkpoint(
        cls, folder: Path, *, precision: str = "float32", norm: NormKind = "fused", bounds: Bounds | None = None
    ) -> EagerExecutor:
        """Run a checkpoint folder without a package: fixtures and tests; serving goes through a package."""
        decoder = build_decoder(load_checkpoint(folder), precision, norm=norm)
        return cls(decoder, precision=precision, contract=InputContract.of(decoder.config, bounds or Bounds()))

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._config

    @property
    def precision(self) -> str:
        """Working precision of weights, cache and activations."""
        return self._precision

    @property
    def contract(self) -> InputContract:
        """What a step's inputs must satisfy."""
        return self._contract

    @property
    def threads(self) -> int:
        """Compute threads of a step."""
        return self._threads

    def new_pool(self, num_slots: int) -> TorchPool:
        """Allocate a zeroed pool in the working precision."""
        return TorchPool(
            num_layers=self._config.num_layers,
            num_slots=num_slots,
            width=self._config.kv_width,
            dtype=PRECISIONS[self._precision],
        )

    def step(
        self, tokens: Integers, positions: Integers, slots: Integers, context_lengths: Integers, pool: KVPool
    ) -> StepOutput:
        """Check the inputs, then run the module; see `Executor.step`."""
        if self._decoder is None:
            raise BackendRefused("the executor has been closed", fix="load the package again")
        self._contract.check(tokens, positions, slots, context_lengths, num_slots=pool.num_slots)
        tables = torch_pool(pool, self._config, self._precision)
        hold_threads(self._threads)
        try:
            with torch.inference_mode():
                logits, new_k, new_v = self._decoder(
                    as_tensor(tokens),
                    as_tensor(positions),
                    tables.k,
                    tables.v,
                    as_tensor(slots),
                    as_tensor(context_lengths),
                )
        except RuntimeError as error:
            raise classify_execution(error, self.backend) from error
        return StepOutput(logits.numpy(), new_k, new_v)

    def close(self) -> None:
        """Drop the weights."""
        self._decoder = None


def as_tensor(array: Integers) -> torch.Tensor:
    """View an array as a tensor; strided or read-only arrays are copied first, since torch cannot view them safely."""
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = array.copy()
    return torch.from_numpy(array)


def hold_threads(threads: int) -> None:
    """Keep torch at the pinned number of threads; it is process-wide, so another executor may have moved it."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def load_eager(package: Path, spec: LoadSpec) -> EagerExecutor:
    """Fill the decoder from `weights.safetensors` of a verified package folder."""
    decoder = Decoder(spec.config, spec.precision, norm=cast(NormKind, spec.flags.get("norm", "fused")))
    try:
        decoder.load_state_dict(load_file(package / WEIGHTS), strict=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise BackendRefused(
            f"the package's weights do not fit its configuration: {error}", fix="prepare the model again"
        ) from error
    hold_threads(spec.threads)
    return EagerExecutor(
        decoder.eval().requires_grad_(False),
        precision=spec.precision,
        contract=spec.contract,
        threads=spec.threads,
    )
