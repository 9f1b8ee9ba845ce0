"""What does a step compute that is handed each row's context in place, instead of looking it up in the pool?

One table a layer and side, [B,kv_heads,S,head_dim]: column j of a row is its position j.  The step puts its new keys
and values into their columns and attends to what then stands there, so no context is copied at all where the backend
lets a table be input and output at once.  In torch the step is as pure as any other: it answers new tables.

With a tile of queries, and S a multiple of `layout.COLUMNS`, a row's bits are its own, for the reasons that stand in
`runtime.models.invariant`.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.onnx import ops as onnx_operators

from runtime.models.config import ModelConfig
from runtime.models.decoder import Block, Decoder, NormKind


@torch.library.custom_op("replaylab::put_columns", mutates_args=())
def put_columns(table: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """Put values [B,heads,T,head_dim] into columns starts[b].. of a table [B,heads,S,head_dim]; the table is kept."""
    batch, heads, tokens, _ = values.shape
    columns = starts[:, None, None] + torch.arange(tokens)
    filled = table.clone()
    filled[torch.arange(batch)[:, None, None], torch.arange(heads)[None, :, None], columns] = values
    return filled


@put_columns.register_fake
def _(table: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    return torch.empty_like(table)


class ResidentBlock(Block):
    """One layer over tables whose columns are positions."""

    def attend(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        tables: tuple[Tensor, Tensor],
        starts: Tensor,
        *,
        mask: Tensor,
        tile: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend and feed forward: x [B,T,width] and both tables, with the new columns.

        angles [B,T,head_dim/2], starts [B], mask [B,1,T,S] or, with a tile, [B,1,queries,S].
        """
        batch, tokens, _ = x.shape
        q, k, v = self.project_rows(x, angles)
        shape = (batch, tokens, -1, self.head_dim)
        keys = put_columns(tables[0], k.reshape(shape).transpose(1, 2), starts)
        values = put_columns(tables[1], v.reshape(shape).transpose(1, 2), starts)
        if tile is None:
            grouped = self.heads > self.kv_heads  # exporters refuse the word where there is nothing to group
            answered = functional.scaled_dot_product_attention(
                q.reshape(shape).transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=grouped
            )
            attended = answered.transpose(1, 2).reshape(batch, tokens, -1)
        else:
            attended = self.ungroup(self.attend_in_tiles(q.reshape(shape), keys, values, mask=mask, tile=tile), tokens)
        return self.feed_forward(x + self.out(attended)), keys, values

    def project_rows(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [B,T,heads*head_dim], the first two rotated."""
        batch, tokens, _ = x.shape
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        turned, v = self.qkv(self.attention_norm(x)).split([q_width + kv_width, kv_width], dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            heads = turned.reshape(batch, tokens, self.heads + self.kv_heads, self.head_dim)
            q, k = heads.split([self.heads, self.kv_heads], dim=2)
            turned = torch.cat([self.query_norm(q), self.key_norm(k)], 2).reshape(batch, tokens, q_width + kv_width)
        turned = onnx_operators.rotary_embedding(turned, *angles, num_heads=self.heads + self.kv_heads)
        q, k = turned.split([q_width, kv_width], dim=2)
        return q, k, v

    def attend_in_tiles(self, q: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor, tile: int) -> Tensor:
        """Ask q [B,T,heads,head_dim] by key head and in whole tiles; returns [B,kv_heads,T*repeats,head_dim]."""
        asked = self.group(q)
        repeats = self.heads // self.kv_heads
        if repeats % tile == 0:
            return functional.scaled_dot_product_attention(asked, keys, values, attn_mask=mask)
        count = q.shape[1] * repeats
        answered = functional.scaled_dot_product_attention(
            asked.index_select(2, tiled(count, tile, q.device)), keys, values, attn_mask=mask
        )
        # Picked by index, not sliced: a slice would make torch.export ask whether there is anything to cut.
        return answered.index_select(2, torch.arange(count, device=q.device))


def tiled(count: int, tile: int, device: torch.device) -> Tensor:
    """Number `count` queries in whole tiles: the last one stands in for those that are missing."""
    return torch.arange((count + tile - 1) // tile * tile, device=device).clamp(max=count - 1)


class ResidentDecoder(Decoder):
    """The functional step over resident context; weights are those of `Decoder`.

    tile: queries of one attention call are a multiple of it; None leaves each head its own call.
    """

    def __init__(
        self, config: ModelConfig, precision: str = "float32", *, norm: NormKind = "fused", tile: int | None = None
    ) -> None:
        super().__init__(config, precision, norm=norm)
        self.tile = tile
        self.blocks = nn.ModuleList(ResidentBlock(config, norm) for _ in range(config.num_layers))
        self.to(self.embed.weight.dtype)
        self.inverse_frequency = self.inverse_frequency.to(torch.float32)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, token_ids: Tensor, positions: Tensor, context_lengths: Tensor, *tables: Tensor
    ) -> tuple[Tensor, ...]:
        """Run one step.

        token_ids, positions int64 [B,T], context_lengths int64 [B] with context_lengths[b] + T <= S.
        tables [B,kv_heads,S,head_dim]: keys, then values of layer 0, of layer 1, ...; what stands in a row's columns
        from context_lengths[b] on is overwritten or not read, but must be numbers.
        Returns logits float32 [B,T,vocab], then the tables with the new columns.
        """
        x = self.embed(token_ids)
        angle = positions[..., None].to(torch.float32) * self.inverse_frequency
        angles = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        mask = self.mask(token_ids, context_lengths, columns=tables[0].shape[2])
        filled: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x, keys, values = cast(ResidentBlock, block).attend(
                x, angles, (tables[2 * index], tables[2 * index + 1]), context_lengths, mask=mask, tile=self.tile
            )
            filled += [keys, values]
        return self.head(self.norm(x)).to(torch.float32), *filled

    def mask(self, token_ids: Tensor, context_lengths: Tensor, *, columns: int) -> Tensor:
        """Say which columns a query sees: its own position's and all before it, bool [B,1,T or queries,S]."""
        batch, tokens = token_ids.shape
        device = token_ids.device
        limit = context_lengths[:, None] + torch.arange(tokens, device=device)[None]
        if self.tile is not None:
            repeats = self.config.num_heads // self.config.num_kv_heads
            count = tokens * repeats
            if repeats % self.tile == 0:
                limit = limit[:, :, None].expand(batch, tokens, repeats).reshape(batch, count)
            else:
                limit = limit.index_select(1, tiled(count, self.tile, device) // repeats)
        return (torch.arange(columns, device=device)[None, None] <= limit[..., None])[:, None]
