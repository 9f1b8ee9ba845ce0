"""How are the weights of the reference model updated?

Muon (Jordan et al., 2024: momentum made orthogonal by a Newton-Schulz iteration) for the matrices of the layers;
AdamW for embeddings and norms. On this task Muon needs far fewer steps than AdamW alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic in Jordan's text
ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices [N, rows, columns] with all singular values near one."""
    wide = matrices.bfloat16()
    turned = wide.shape[-2] > wide.shape[-1]
    if turned:
        wide = wide.mT
    wide = wide / (wide.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    first, second, third = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = first * wide + (second * gram + third * gram @ gram) @ wide
    return (wide.mT if turned else wide).float()


class Muon:
    """Momentum made orthogonal, for matrices of a few equal shapes, which it updates together."""

    def __init__(self, parameters: Iterable[Tensor], *, rate: float, momentum: float, decay: float) -> None:
        groups: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            groups[tuple(parameter.shape)].append(parameter)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(group), *group[0].shape) for group in self.groups]
        self.rate, self.momentum, self.decay = rate, momentum, decay

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Apply one update at `scale` times the rate; clears the gradients."""
        rate = self.rate * scale
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([one.grad for one in group if one.grad is not None])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(buffer, self.momentum))
            size = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - rate * self.decay).sub_(change, alpha=rate * size)
                parameter.grad = None
