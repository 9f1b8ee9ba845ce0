"""How does the functional step run in eager torch?  The reference that the other backends are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from runtime.backends.contract import Bounds, InputContract
from runtime.backends.errors import BackendRefused
from runtime.backends.executor import StepInputs
from runtime.backends.invariant import recipe_of, tile_of
from runtime.backends.linears import check_process, pack_linears
from runtime.backends.protocol import KVPool, LoadSpec, StepOutput
from runtime.backends.torch_executor import TorchExecutor, hold_threads
from runtime.models.decoder import Decoder, NormKind
from runtime.models.loader import build_decoder, load_checkpoint, new_decoder

WEIGHTS = "weights.safetensors"


class EagerExecutor(TorchExecutor[Decoder]):
    """The decoder module itself, called without gradients."""

    backend = "eager"

    @classmethod
    def from_checkpoint(
        cls, folder: Path, *, precision: str = "float32", norm: NormKind = "fused", bounds: Bounds | None = None
    ) -> EagerExecutor:
        """Run a checkpoint folder without a package: fixtures and tests; serving goes through a package."""
        decoder = build_decoder(load_checkpoint(folder), precision, norm=norm)
        contract = InputContract.of(decoder.config, bounds or Bounds())
        return cls(decoder, LoadSpec(config=decoder.config, contract=contract, precision=precision))

    def run(self, loaded: Decoder, inputs: StepInputs, pool: KVPool) -> StepOutput:
        """Call the module."""
        tensors = self.tensors(inputs, pool)
        hold_threads(self.threads)
        with torch.inference_mode():
            logits, new_k, new_v = loaded(*tensors)
        return StepOutput(logits.numpy(), new_k, new_v)


def load_eager(package: Path, spec: LoadSpec) -> EagerExecutor:
    """Fill the decoder from `weights.safetensors` of a verified package folder."""
    tile = tile_of(spec.flags, "eager") if spec.batch_invariant else None
    norm = cast(NormKind, spec.flags.get("norm", "fused"))
    decoder = new_decoder(spec.config, spec.precision, norm=norm, tile=tile)
    try:
        decoder.load_state_dict(load_file(package / WEIGHTS), strict=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise BackendRefused(
            f"the package's weights do not fit its configuration: {error}", fix="prepare the model again"
        ) from error
    hold_threads(spec.threads)
    return eager_executor(decoder.eval().requires_grad_(False), spec)


def eager_executor(decoder: Decoder, spec: LoadSpec) -> EagerExecutor:
    """Make the executor of a filled decoder, which becomes its own, with the linear layers that the recipe wants."""
    if spec.batch_invariant:
        check_process(spec.flags)
        if recipe_of(spec.flags) == "tile":
            pack_linears(decoder)
    return EagerExecutor(decoder, spec)
