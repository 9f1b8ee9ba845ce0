"""Which weights does training start from?

Copying from the context needs two layers to agree: one brings each token's predecessor along, the next looks for the
token whose predecessor equals the present one (induction; Olsson et al., 2022). From random weights a small model
finds this slowly. So training starts with a rough hand-made form of both, and everything else near zero; all weights
are then trained as usual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.models.reference.network import Network, Shape

EMBEDDING_DEVIATION = 0.05
CONSTANT_WIDTH = 16  # dimensions that hold the same value for every token, so that heads can ask for positions alone
CONSTANT = 0.06
FINAL_GAIN = 0.25  # keeps the first logits small although input and output embeddings are tied
FAR = 7  # the slowest rotations, which hardly turn within a prompt and so compare content
MATCH = 2.0
COPY = 1.0
INDUCTION_HEADS = 4  # in each of the second and third layer


@dataclass(frozen=True, slots=True)
class Look:
    """What a head of the first layer looks back by: a distance in tokens, told by rotations `start` to `stop`.

    Fast rotations with a large amplitude single out one token; slower ones with a small amplitude cover some ten.
    """

    distance: int
    start: int
    stop: int
    amplitude: float
    strength: float


def _token(distance: int) -> Look:
    return Look(distance, 0, 4, 7.0, 1.0)


def _window(distance: int) -> Look:
    return Look(distance, 2, 6, 3.0, 2.0)


LOOKS = (_token(1), _token(1), _token(2), _token(2), _token(3), _token(3), _window(4), _window(8))
GROUPS = 2  # heads that look back by one token read two different parts of it; so do those for two and three


def _orthonormal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


def _look_back(query: Tensor, key: Tensor, *, look: Look, shape: Shape) -> None:
    """Make one head's rows [head_size, width] attend to a distance, whatever the tokens are."""
    half = query.shape[0] // 2
    constant = torch.zeros(query.shape[1])
    constant[-CONSTANT_WIDTH:] = 1.0
    content = EMBEDDING_DEVIATION * (shape.hidden_size - CONSTANT_WIDTH) ** 0.5
    seen = shape.hidden_size**0.5 * CONSTANT / (content**2 + CONSTANT**2 * CONSTANT_WIDTH) ** 0.5
    direction = constant * look.amplitude / (seen * CONSTANT_WIDTH)
    query.zero_()
    key.zero_()
    for index in range(look.start, look.stop):
        angle = torch.tensor(look.distance * shape.rope_theta ** (-index / half))
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
    for head, look in enumerate(LOOKS):
        rows = slice(head * size, (head + 1) * size)
        _look_back(first.q_proj.weight[rows], first.k_proj.weight[rows], look=look, shape=shape)
        part = head % GROUPS if head < len(LOOKS) - GROUPS else head
        first.v_proj.weight[rows] = read[part * size : (part + 1) * size]
        first.o_proj.weight[:, rows] = look.strength * EMBEDDING_DEVIATION * write[rows].T
    slow = [*range(half - FAR, half), *range(size - FAR, size)]
    for layer in (1, 2):
        attention, copied = network.attention(layer), _orthonormal(width)
        for head in range(INDUCTION_HEADS):
            rows = slice(head * size, (head + 1) * size)
            offset = (head // 2 + 2 * (layer - 1)) * size // 4
            dims = [(offset + index) % size for index in range(len(slow))]
            seen = [[(head % GROUPS + GROUPS * back) * size + dim for dim in dims] for back in range(3)]
            query, key = attention.q_proj.weight[rows], attention.k_proj.weight[rows]
            query.zero_()
            key.zero_()
            # the present token and its two predecessors should be the three predecessors of the token to copy
            query[slow] = MATCH * (read[seen[0]] + write[seen[0]] + write[seen[1]])
            key[slow] = MATCH * (write[seen[0]] + write[seen[1]] + write[seen[2]])
            attention.v_proj.weight[rows] = copied[rows]
            attention.o_proj.weight[:, rows] = COPY * EMBEDDING_DEVIATION * copied[rows].T
