"""What does one engine step compute?  The decoder as a pure function over a paged cache, the same on every backend.

The functional step reads keys and values from two flat tables by gather and returns the new ones; the host writes them.
Nothing is mutated inside the graph, so `torch.export` takes it whole.  Flat tables matter: a pool indexed per layer is
copied at every call by ONNX Runtime.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from runtime.models.config import ModelConfig, inverse_frequencies

NormKind = Literal["fused", "unfused"]
PRECISIONS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
"""In what activations and cache are held; int8 is what a backend's compiler makes of the linear layers' weights."""


class RootMeanSquareNorm(nn.Module):
    """RMS norm.  `unfused` stays in the working precision, where a bfloat16 row depends on its place in the batch."""

    def __init__(self, width: int, *, eps: float, kind: NormKind) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "fused":
            return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of a head's columns by the angle of their position."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class Block(nn.Module):
    """One layer: grouped-query attention over cached and new keys, then a gated feed-forward."""

    def __init__(self, config: ModelConfig, norm: NormKind) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        width, inner = config.hidden_size, config.intermediate_size
        attention = self.heads * self.head_dim
        self.attention_norm = RootMeanSquareNorm(width, eps=config.rms_norm_eps, kind=norm)
        self.feed_forward_norm = RootMeanSquareNorm(width, eps=config.rms_norm_eps, kind=norm)
        self.qkv = nn.Linear(width, attention + 2 * config.kv_width, bias=config.attention_bias)
        self.out = nn.Linear(attention, width, bias=config.output_bias)
        self.gate_up = nn.Linear(width, 2 * inner, bias=config.mlp_bias)
        self.down = nn.Linear(inner, width, bias=config.mlp_bias)
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            self.query_norm = RootMeanSquareNorm(self.head_dim, eps=config.rms_norm_eps, kind=norm)
            self.key_norm = RootMeanSquareNorm(self.head_dim, eps=config.rms_norm_eps, kind=norm)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past_k: Tensor, past_v: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend and feed forward.

        x [B,T,width], past_k and past_v [B,kv_heads,S,head_dim], mask [B,T*heads/kv_heads,S+T].
        Returns x and the new keys and values [B,T,kv_heads*head_dim].
        """
        batch, tokens, _ = x.shape
        q, k, v = self.project(x, cos, sin)
        keys, values = torch.cat([past_k, k.transpose(1, 2)], 2), torch.cat([past_v, v.transpose(1, 2)], 2)
        attended = functional.scaled_dot_product_attention(self.group(q), keys, values, attn_mask=mask[:, None])
        x = self.feed_forward(x + self.out(self.ungroup(attended, tokens)))
        return x, k.reshape(batch, tokens, -1), v.reshape(batch, tokens, -1)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B,T,heads,head_dim], keys and values [B,T,kv_heads,head_dim], the first two rotated."""
        batch, tokens, _ = x.shape
        turning = self.heads + self.kv_heads
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, turning + self.kv_heads, self.head_dim)
        turned, v = qkv.split([turning, self.kv_heads], dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = turned.split([self.heads, self.kv_heads], dim=2)
            turned = torch.cat([self.query_norm(q), self.key_norm(k)], 2)
        q, k = rotate(turned, cos, sin).split([self.heads, self.kv_heads], dim=2)
        return q, k, v

    def group(self, q: Tensor) -> Tensor:
        """Make the heads that share a key head queries of one attention, so that no key is repeated.

        [B,T,heads,head_dim] -> [B,kv_heads,T*repeats,head_dim], the heads of a token side by side.
        """
        batch, tokens = q.shape[:2]
        repeats = self.heads // self.kv_heads
        parted = q.reshape(batch, tokens, self.kv_heads, repeats, self.head_dim)
        return parted.permute(0, 2, 1, 3, 4).reshape(batch, self.kv_heads, tokens * repeats, self.head_dim)

    def ungroup(self, attended: Tensor, tokens: int) -> Tensor:
        """Undo `group`: [B,kv_heads,T*repeats,head_dim] -> [B,T,heads*head_dim]."""
        batch, repeats = attended.shape[0], self.heads // self.kv_heads
        parted = attended.reshape(batch, self.kv_heads, tokens, repeats, self.head_dim)
        return parted.permute(0, 2, 1, 3, 4).reshape(batch, tokens, self.heads * self.head_dim)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Add the gated feed-forward layer to the residual stream [B,T,width]."""
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class Decoder(nn.Module):
    """The functional step of the house's model contract."""

    inverse_frequency: Tensor

    def __init__(self, config: ModelConfig, precision: str = "float32", *, norm: NormKind = "fused") -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, norm) for _ in range(config.num_layers))
        self.norm = RootMeanSquareNorm(config.hidden_size, eps=config.rms_norm_eps, kind=norm)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to(PRECISIONS[precision])
        # Angles stay in float32 whatever the precision: positions above 256 are not exact in bfloat16.
        frequencies = torch.tensor(inverse_frequencies(config), dtype=torch.float32)
        self.register_buffer("inverse_frequency", frequencies, persistent=False)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        slots: Tensor,
        context_lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one step.

        token_ids, positions int64 [B,T]: consecutive tokens of each row; padding stands at the end of a row.
        k_pool, v_pool [layers*slots, kv_heads*head_dim]: read only, layer i's slot s is row i*slots + s.
        slots int64 [B,S]: the pool slots of the row's earlier positions; only the first context_lengths[b] count.
        context_lengths int64 [B].
        Returns logits float32 [B,T,vocab], new keys and new values [layers,B,T,kv_heads*head_dim].
        """
        batch, tokens = token_ids.shape
        context = slots.shape[1]
        config = self.config
        x = self.embed(token_ids)
        angle = positions[..., None].to(torch.float32) * self.inverse_frequency
        cos, sin = angle.cos().to(x.dtype)[:, :, None], angle.sin().to(x.dtype)[:, :, None]
        seen = torch.arange(context, device=slots.device)[None, None] < context_lengths[:, None, None]
        order = torch.arange(tokens, device=slots.device)
        causal = (order[None, :] <= order[:, None])[None].expand(batch, tokens, tokens)
        mask = torch.cat([seen.expand(batch, tokens, context), causal], 2)
        repeats = config.num_heads // config.num_kv_heads
        if repeats > 1:
            mask = mask[:, :, None].expand(batch, tokens, repeats, context + tokens)
            mask = mask.reshape(batch, tokens * repeats, context + tokens)
        new_k: list[Tensor] = []
        new_v: list[Tensor] = []
        for block, past_k, past_v in zip(self.blocks, *self.gather(k_pool, v_pool, self.heads_of(slots)), strict=True):
            x, k, v = block(x, cos, sin, past_k, past_v, mask)
            new_k.append(k)
            new_v.append(v)
        return self.head(self.norm(x)).to(torch.float32), torch.stack(new_k), torch.stack(new_v)

    def heads_of(self, slots: Tensor) -> Tensor:
        """Turn slots [B,S] into rows of a pool that is read by head, [B,kv_heads,S].

        Attention then finds the keys of one head together, and nothing is transposed.
        """
        heads = torch.arange(self.config.num_kv_heads, device=slots.device)
        return slots[:, None] * self.config.num_kv_heads + heads[None, :, None]

    def gather(self, k_pool: Tensor, v_pool: Tensor, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Read each layer's cached keys and values, [*rows.shape,head_dim], from rows as `heads_of` gives them."""
        config = self.config
        layer_rows = k_pool.shape[0] // config.num_layers * config.num_kv_heads
        k_heads, v_heads = k_pool.view(-1, config.head_dim), v_pool.view(-1, config.head_dim)
        places = [rows + index * layer_rows for index in range(config.num_layers)]
        return [functional.embedding(p, k_heads) for p in places], [functional.embedding(p, v_heads) for p in places]


class WholeRowDecoder(Decoder):
    """The same step for a backend that would copy a view of the pool: rows are read whole, then taken apart by head.

    ExecuTorch plans memory for a view as for any tensor, and the pool's view at its largest size is far more than a
    machine has.
    """

    def heads_of(self, slots: Tensor) -> Tensor:
        """Leave slots [B,S] as they are."""
        return slots

    def gather(self, k_pool: Tensor, v_pool: Tensor, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Read each layer's cached keys and values, [B,kv_heads,S,head_dim], from slots [B,S]."""
        config = self.config
        layer_rows = k_pool.shape[0] // config.num_layers
        shape = (*rows.shape, config.num_kv_heads, config.head_dim)
        places = [rows + index * layer_rows for index in range(config.num_layers)]
        keys = [functional.embedding(place, k_pool).view(shape).transpose(1, 2) for place in places]
        values = [functional.embedding(place, v_pool).view(shape).transpose(1, 2) for place in places]
        return keys, values
