"""Which weights does training start from?

Copying from the context needs two layers to agree: one brings each token's predecessor along, the next looks for the
token whose predecessor equals the present one (induction; Olsson et al., 2022). From random weights a small model
finds this slowly. So training starts with a rough hand-made form of both, and everything else near zero; all weights
are then trained as usual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.models.reference.network import Network, Shape

EMBEDDING_DEVIATION = 0.05
CONSTANT_WIDTH = 16  # dimensions that hold the same value for every token, so that heads can ask for positions alone
CONSTANT = 0.06
FINAL_GAIN = 0.25  # keeps the first logits small although input and output embeddings are tied
SHARPNESS = 7.0  # amplitude of the positional queries and keys
NEAR = 4  # the fastest rotations, which tell neighbours apart
FAR = 7  # the slowest rotations, which hardly turn within a prompt and so compare content
MATCH = 2.5
COPY = 1.0
DISTANCES = (1, 1, 1, 1, 2, 2, 3, 0)  # what each head of the first layer looks back by
INDUCTION_HEADS = 4  # they follow the first layer's heads of distance 1


def _orthonormal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


def _look_back(query: Tensor, key: Tensor, *, distance: int, shape: Shape) -> None:
    """Make one head's rows [head_size, width] attend to the token `distance` before, whatever the tokens are."""
    half = query.shape[0] // 2
    constant = torch.zeros(query.shape[1])
    constant[-CONSTANT_WIDTH:] = 1.0
    content = EMBEDDING_DEVIATION * (shape.hidden_size - CONSTANT_WIDTH) ** 0.5
    seen = shape.hidden_size**0.5 * CONSTANT / (content**2 + CONSTANT**2 * CONSTANT_WIDTH) ** 0.5
    direction = constant * SHARPNESS / (seen * CONSTANT_WIDTH)
    query.zero_()
    key.zero_()
    for index in range(NEAR):
        angle = torch.tensor(distance * shape.rope_theta ** (-index / half))
        key[index] = direction
        query[index] = direction * angle.cos()
        query[half + index] = -direction * angle.sin()


@torch.no_grad()
def initialize(network: Network) -> None:
    """Set every weight of a network with at least three layers and eight heads; draws from torch's generator."""
    shape, size = network.shape, network.head_size
    half, width = size // 2, shape.hidden_size
    for name, parameter in network.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5 * width**-0.5)
    embedding = network.model.embed_tokens.weight
    torch.nn.init.normal_(embedding, std=EMBEDDING_DEVIATION)
    embedding[:, -CONSTANT_WIDTH:] = CONSTANT
    network.model.norm.weight.fill_(FINAL_GAIN)
    read, write = _orthonormal(width), _orthonormal(width)
    first = network.attention(0)
    for head, distance in enumerate(DISTANCES):
        rows = slice(head * size, (head + 1) * size)
        _look_back(first.q_proj.weight[rows], first.k_proj.weight[rows], distance=distance, shape=shape)
        first.v_proj.weight[rows] = read[rows]
        first.o_proj.weight[:, rows] = EMBEDDING_DEVIATION * write[rows].T
    slow = [*range(half - FAR, half), *range(size - FAR, size)]
    for layer in (1, 2):
        attention, copied = network.attention(layer), _orthonormal(width)
        for head in range(INDUCTION_HEADS):
            rows = slice(head * size, (head + 1) * size)
            compared = [head * size + (index + 16 * layer) % size for index in range(len(slow))]
            query, key = attention.q_proj.weight[rows], attention.k_proj.weight[rows]
            query.zero_()
            key.zero_()
            query[slow] = MATCH * read[compared]
            key[slow] = MATCH * write[compared]
            attention.v_proj.weight[rows] = copied[rows]
            attention.o_proj.weight[:, rows] = COPY * EMBEDDING_DEVIATION * copied[rows].T
