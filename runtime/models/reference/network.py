"""What does one training forward of the reference model compute?

The plain Llama decoder, written for training only: parameter names are those of Hugging Face's LlamaForCausalLM, so
the weights save as a standard checkpoint. The runtime executes the weights with its own decoder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the decoder, named as in a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rope_theta: float
    rms_norm_eps: float

    @classmethod
    def read(cls, config: Path) -> Shape:
        """Read the sizes from a config.json with tied embeddings and as many key as query heads."""
        document: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        return cls(**{name: document[name] for name in cls.__slots__})


def rotation(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [..., T, head_size] of rotary positions in the half-split layout."""
    frequencies = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn vectors [..., T, head_size] by their positions."""
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cosine + torch.cat((-second, first), dim=-1) * sine


class Cache:
    """Keys and values [rows, heads, positions, head_size] of every layer, for evaluation."""

    def __init__(self, *, layers: int, rows: int, heads: int, positions: int, head_size: int) -> None:
        self.keys = [torch.zeros(rows, heads, positions, head_size) for _ in range(layers)]
        self.values = [torch.zeros(rows, heads, positions, head_size) for _ in range(layers)]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tokens of one call stand: rotation, cached rows and positions, and who sees whom [rows, 1, T, S]."""

    cosine: Tensor
    sine: Tensor
    rows: Tensor
    positions: Tensor
    visible: Tensor


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Attend within each row from left to right."""
        query, key, value = self._heads(hidden, cosine, sine)
        with torch.autocast("cpu", enabled=False):
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self._join(mixed)

    def cached(self, hidden: Tensor, place: Place, keys: Tensor, values: Tensor) -> Tensor:
        """Attend over the cache after writing this call's keys and values to it."""
        query, key, value = self._heads(hidden, place.cosine, place.sine)
        rows, positions = place.rows[:, None], place.positions
        keys[rows, :, positions] = key.transpose(1, 2)
        values[rows, :, positions] = value.transpose(1, 2)
        span = place.visible.shape[-1]
        chosen = place.rows
        mixed = functional.scaled_dot_product_attention(
            query, keys[chosen, :, :span], values[chosen, :, :span], attn_mask=place.visible
        )
        return self._join(mixed)

    def _heads(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = (*hidden.shape[:2], self.heads, -1)
        query = self.q_proj(hidden).view(split).transpose(1, 2)
        key = self.k_proj(hidden).view(split).transpose(1, 2)
        value = self.v_proj(hidden).view(split).transpose(1, 2)
        # float32 also under autocast: the bfloat16 attention of CPU torch is several times slower backwards
        return rotate(query.float(), cosine, sine), rotate(key.float(), cosine, sine), value.float()

    def _join(self, mixed: Tensor) -> Tensor:
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return down(silu(gate) * up)."""
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Add attention, then the feed-forward block."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cosine, sine)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def cached(self, hidden: Tensor, place: Place, keys: Tensor, values: Tensor) -> Tensor:
        """Do the same over a cache."""
        hidden = hidden + self.self_attn.cached(self.input_layernorm(hidden), place, keys, values)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Body(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)


class Network(nn.Module):
    """The whole decoder; the output matrix is the embedding matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)

    @property
    def head_size(self) -> int:
        """The width of one attention head."""
        return self.shape.hidden_size // self.shape.num_attention_heads

    def attention(self, layer: int) -> Attention:
        """Return the attention of one layer."""
        found = self.model.layers[layer].self_attn
        if not isinstance(found, Attention):
            raise TypeError(f"layer {layer} has no attention")
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, V] of tokens [B, T]."""
        positions = torch.arange(tokens.shape[1])
        cosine, sine = rotation(positions, self.head_size, self.shape.rope_theta)
        hidden = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            hidden = layer(hidden, cosine, sine)
        return functional.linear(self.model.norm(hidden), self.model.embed_tokens.weight)

    def new_cache(self, *, rows: int, positions: int) -> Cache:
        """Return an empty cache."""
        shape = self.shape
        return Cache(
            layers=shape.num_hidden_layers,
            rows=rows,
            heads=shape.num_attention_heads,
            positions=positions,
            head_size=self.head_size,
        )

    def cached(self, tokens: Tensor, positions: Tensor, cache: Cache, rows: Tensor) -> Tensor:
        """Return logits [B, T, V] of tokens [B, T] at positions [B, T], appended to the cache's rows [B].

        A padded token repeats a position that a later call overwrites before anyone sees it.
        """
        cosine, sine = rotation(positions, self.head_size, self.shape.rope_theta)
        span = int(positions.max()) + 1
        visible = torch.arange(span)[None, None] <= positions[:, :, None]
        place = Place(cosine[:, None], sine[:, None], rows, positions, visible[:, None])
        hidden = self.model.embed_tokens(tokens)
        for layer, keys, values in zip(self.model.layers, cache.keys, cache.values, strict=True):
            hidden = layer.cached(hidden, place, keys, values)  # type: ignore[operator]
        return functional.linear(self.model.norm(hidden), self.model.embed_tokens.weight)
