"""Which linear layers answer a row alike among any number of rows, and does this process's MKL?"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from runtime.backends.errors import BackendRefused
from runtime.backends.invariant import recipe_of

STRICT_MODES = ("AVX512,STRICT", "AVX2,STRICT")


def mkl_is_strict() -> bool:
    """Try whether MKL answers a row alone as it answers it among others, which its default kernels do not."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(11, 256, generator=generator), torch.randn(768, 256, generator=generator)
    together = torch.nn.functional.linear(rows, weight)
    return torch.equal(together[:1], torch.nn.functional.linear(rows[:1], weight))


def check_process(flags: Mapping[str, str]) -> None:
    """Refuse a recipe that this process's environment does not carry; what MKL does is tried, not only read."""
    if recipe_of(flags) != "strict":
        return
    mode = os.environ.get("MKL_CBWR")
    if mode not in STRICT_MODES:
        raise BackendRefused(
            f"the recipe 'strict' needs MKL's strict mode; MKL_CBWR is {mode or 'unset'} in this process",
            fix="start the process with MKL_CBWR=AVX512,STRICT (or AVX2,STRICT), or prepare with --flag recipe=tile",
            evidence={"operator_details": f"MKL_CBWR={mode}"},
        )
    if not mkl_is_strict():
        raise BackendRefused(
            f"MKL varies with the batch under MKL_CBWR={mode}: on this processor it does not honour the setting",
            fix="prepare with --flag recipe=tile",
            evidence={"operator_details": f"MKL_CBWR={mode}", "validation_output": "MKL varies with the batch"},
        )


class PackedLinear(torch.nn.Module):
    """A linear layer on weights packed for oneDNN: one kernel for any number of rows, unlike MKL's sgemm."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()  # pyright: ignore[reportUnnecessaryComparison]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


def pack_linears(module: torch.nn.Module) -> None:
    """Replace every linear layer of a module by its packed form, in place."""
    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)
