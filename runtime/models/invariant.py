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
from runtime.models.decoder import Block, Decoder, NormKind
from runtime.models.layout import TILE


class InvariantBlock(Block):
    """One layer over columns that are positions."""

    def attend(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        places: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend and feed forward; as `Block.forward`.

        x [B,T,width], past_k and past_v [B*kv_heads*S,head_dim], places as `InvariantDecoder.places` gives them.
        """
        batch, tokens, _ = x.shape
        q, k, v = self.project(x, cos, sin)
        columns, queries, mask = places
        shape = (batch, self.kv_heads, -1, self.head_dim)
        keys = torch.index_put(past_k, (columns,), k.reshape(-1, self.head_dim)).view(shape)
        values = torch.index_put(past_v, (columns,), v.reshape(-1, self.head_dim)).view(shape)
        attended = functional.scaled_dot_product_attention(
            self.group(q).index_select(2, queries), keys, values, attn_mask=mask
        )
        # Picked by index, not sliced: a slice would make torch.export ask whether there is anything to cut.
        real = torch.arange(tokens * (self.heads // self.kv_heads), device=x.device)
        x = self.feed_forward(x + self.out(self.ungroup(attended.index_select(2, real), tokens)))
        return x, k.reshape(batch, tokens, -1), v.reshape(batch, tokens, -1)


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
        x = self.embed(token_ids)
        angle = positions[..., None].to(torch.float32) * self.inverse_frequency
        cos, sin = angle.cos().to(x.dtype)[:, :, None], angle.sin().to(x.dtype)[:, :, None]
        places = self.places(token_ids, slots, context_lengths)
        new_k: list[Tensor] = []
        new_v: list[Tensor] = []
        for block, *past in zip(
            self.blocks, *self.gather(k_pool, v_pool, self.heads_of(slots).reshape(-1)), strict=True
        ):
            x, k, v = cast(InvariantBlock, block).attend(x, cos, sin, past[0], past[1], places)
            new_k.append(k)
            new_v.append(v)
        return self.head(self.norm(x)).to(torch.float32), torch.stack(new_k), torch.stack(new_v)

    def places(self, token_ids: Tensor, slots: Tensor, context_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Say where things go: rows of new keys [B*T*kv_heads], which query each tile row is [Q], mask [B,1,Q,S]."""
        batch, tokens = token_ids.shape
        context, groups = slots.shape[1], self.config.num_kv_heads
        repeats = self.config.num_heads // groups
        device = slots.device
        own = context_lengths[:, None] + torch.arange(tokens, device=device)[None]
        tables = torch.arange(batch, device=device)[:, None] * groups + torch.arange(groups, device=device)[None]
        columns = (tables[:, None] * context + own[:, :, None]).reshape(-1)
        count = (tokens * repeats + self.tile - 1) // self.tile * self.tile
        queries = torch.arange(count, device=device).clamp(max=tokens * repeats - 1)
        limit = own.index_select(1, queries // repeats)
        mask = torch.arange(context, device=device)[None, None] <= limit[..., None]
        return columns, queries, mask[:, None]
