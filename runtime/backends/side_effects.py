"""Does calling a module change the module?  Export drops such changes in silence, so they are looked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from runtime.backends.errors import BackendRefused

_PLAIN = (bool, int, float, str, bytes, type(None))


def check_side_effects(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Call the module once and refuse it where the call changed a counter, a list, a buffer or a new attribute.

    Returns what the call returned.
    """
    before = module_state(module)
    with torch.no_grad():
        outputs = module(*inputs)
    after = module_state(module)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise BackendRefused(
            f"calling the model changes it ({', '.join(changed)}): capture would drop that",
            fix="make forward a pure function of its inputs",
            evidence={"operator_details": f"hidden side effect: {', '.join(changed)}"},
            stage="a01",
        )
    return outputs


def module_state(module: torch.nn.Module) -> dict[str, object]:
    """Describe every attribute, parameter and buffer so that two descriptions differ where a call changed one."""
    found: dict[str, object] = {}
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers"):
                held: Mapping[str, Tensor | None] = value
                found |= {f"{prefix}.{key}".lstrip("."): _describe(tensor) for key, tensor in held.items()}
            elif not name.startswith("_"):
                found[f"{prefix}.{name}".lstrip(".")] = _describe(value)
    return found


def _describe(value: Any) -> object:
    if isinstance(value, Tensor):
        return (id(value), value._version, tuple(value.shape))  # the version counts writes in place
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return tuple(_describe(entry) for entry in value)
    if isinstance(value, dict):
        return tuple((str(key), _describe(entry)) for key, entry in value.items())
    return id(value)
