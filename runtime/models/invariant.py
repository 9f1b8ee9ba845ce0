"""What does a step compute whose bits are a row's own?  The functional step with keys and values laid out by position.

Three things make a row's bits a function of its own tokens and positions (the linear layers are the backend's part):

- Column j of the gathered keys and values is position j, whether it was cached or is new in this step.  New ones are
  put into their columns before attention, out of place, so a chunk boundary leaves no trace in the order of a sum.
- The number of columns is a multiple of `COLUMNS`: kernels sum in blocks, and an unused column adds an exact zero.
- Queries come in tiles of `TILE`: one query alone takes another kernel than many, and so would decode against prefill.

The signature is that of `runtime.models.decoder.Decoder`, except that `slots` has a column for the new tokens too;
`runtime.backends.invariant.arrange` brings any call into this form.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from runtime.models.config import ModelConfig
from runtime.models.decoder import Block, Decoder, NormKind, rotate
from runtime.models.layout import TILE


class InvariantBlock(Block):
    """One layer over columns that are positions."""

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,T,width], past keys and values [B*S,kv width], places as `InvariantDecoder.places` -> as `forward`."""
        batch, tokens, _ = x.shape
        groups, repeats, size = self.kv_heads, self.heads // self.kv_heads, self.head_dim
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, self.heads + 2 * groups, size)
        q, k, v = qkv.split([self.heads, groups, groups], dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        new_k, new_v = k.reshape(batch, tokens, -1), v.reshape(batch, tokens, -1)
        columns, queries, mask = places
        keys = torch.index_put(past[0], (columns,), new_k.flatten(0, 1)).view(batch, -1, groups, size)
        values = torch.index_put(past[1], (columns,), new_v.flatten(0, 1)).view(batch, -1, groups, size)
        # The heads that share a key head are queries of one attention: keys and values are not repeated.
        q = q.view(batch, tokens, groups, repeats, size).permute(0, 2, 1, 3, 4).reshape(batch, groups, -1, size)
        attended = functional.scaled_dot_product_attention(
            q.index_select(2, queries), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask
        )
        # Picked by index, not sliced: a slice would make torch.export ask whether there is anything to cut.
        real = torch.arange(tokens * repeats, device=x.device)
        attended = attended.index_select(2, real).view(batch, groups, tokens, repeats, size)
        x = x + self.out(attended.permute(0, 2, 1, 3, 4).reshape(batch, tokens, self.heads * size))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, -1)
        x = x + self.down(functional.silu(gate) * up)
        return x, new_k, new_v


class InvariantDecoder(Decoder):
    """The functional step in which a row's bits do not depend on batch, padding, chunks or neighbours."""

    def __init__(
        self, config: ModelConfig, precision: str = "float32", *, norm: NormKind = "fused", tile: int = TILE
    ) -> None:
        super().__init__(config, precision, norm=norm)
        self.tile = tile
        self.blocks = nn.ModuleList(InvariantBlock(config, norm) for _ in range(config.num_layers))
        self.to(self.embed.weight.dtype)
        self.inverse_frequency = self.inverse_frequency.to(torch.float32)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        slots: Tensor,
        context_lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one step; as `Decoder.forward`, with slots [B,S] such that context_lengths[b] + T <= S for every row.

        What stands in a slot from context_lengths[b] on is not read.
        """
        config = self.config
        pool_slots = k_pool.shape[0] // config.num_layers
        x = self.embed(token_ids)
        angle = positions[..., None].to(torch.float32) * self.inverse_frequency
        cos, sin = angle.cos().to(x.dtype)[:, :, None], angle.sin().to(x.dtype)[:, :, None]
        places = self.places(token_ids, slots, context_lengths)
        flat = slots.reshape(-1)
        new_k: list[Tensor] = []
        new_v: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            rows = flat + index * pool_slots
            past = functional.embedding(rows, k_pool), functional.embedding(rows, v_pool)
            x, k, v = cast(InvariantBlock, block).attend(x, cos, sin, past, places)
            new_k.append(k)
            new_v.append(v)
        return self.head(self.norm(x)).to(torch.float32), torch.stack(new_k), torch.stack(new_v)

    def places(self, token_ids: Tensor, slots: Tensor, context_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return where things go: new tokens' columns [B*T], the token-and-head of each query [Q], mask [B,1,Q,S]."""
        batch, tokens = token_ids.shape
        context = slots.shape[1]
        repeats = self.config.num_heads // self.config.num_kv_heads
        device = slots.device
        own = context_lengths[:, None] + torch.arange(tokens, device=device)[None]
        columns = (torch.arange(batch, device=device)[:, None] * context + own).reshape(-1)
        count = (tokens * repeats + self.tile - 1) // self.tile * self.tile
        queries = torch.arange(count, device=device).clamp(max=tokens * repeats - 1)
        limit = own.index_select(1, queries // repeats)
        mask = torch.arange(context, device=device)[None, None] <= limit[..., None]
        return columns, queries, mask[:, None]
