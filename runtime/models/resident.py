"""What does a step compute that is handed each row's context in place, instead of looking it up in the pool?

One table a layer and side, [B,S,kv_heads*head_dim]: column j of a row is its position j.  The step puts its new keys
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
    """Put values [B,T,width] into columns starts[b].. of a table [B,S,width]; the table is kept."""
    batch, tokens, _ = values.shape
    filled = table.clone()
    filled[torch.arange(batch)[:, None], starts[:, None] + torch.arange(tokens)] = values
    return filled


@put_columns.register_fake
def _(table: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    return torch.empty_like(table)


@torch.library.custom_op("replaylab::attend_columns", mutates_args=())
def attend_columns(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Attend with queries [B,Q,heads*head_dim], scaled already, to tables [B,S,kv_heads*head_dim].

    mask bool [B,1,Q,S].  Returns [B,Q,heads*head_dim].  Exporters write PyTorch's own attention with heads apart from
    positions, for which everything would have to be transposed.
    """
    parted = [
        side.unflatten(2, (count, -1)).transpose(1, 2)
        for side, count in ((queries, heads), (keys, kv_heads), (values, kv_heads))
    ]
    attended = functional.scaled_dot_product_attention(*parted, attn_mask=mask, scale=1.0, enable_gqa=True)
    return attended.transpose(1, 2).flatten(2).contiguous()


@attend_columns.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: int, kv_heads: int) -> Tensor:
    return torch.empty_like(queries)


@torch.library.custom_op("replaylab::pick_tokens", mutates_args=())
def pick_tokens(x: Tensor, wanted: Tensor) -> Tensor:
    """Pick tokens wanted [B,W,1] of each row of x [B,T,width]; returns [B,W,width]."""
    return x.gather(1, wanted.expand(-1, -1, x.shape[2]))


@pick_tokens.register_fake
def _(x: Tensor, wanted: Tensor) -> Tensor:
    return x.new_empty(wanted.shape[0], wanted.shape[1], x.shape[2])


class ResidentBlock(Block):
    """One layer over tables whose columns are positions.

    Each projection is a layer of its own, because what a joint one answers would be copied apart; `own_projections`
    makes their weights.
    """

    def __init__(self, config: ModelConfig, norm: NormKind) -> None:
        super().__init__(config, norm)
        del self.qkv, self.gate_up
        width, inner = config.hidden_size, config.intermediate_size
        self.q = nn.Linear(width, self.heads * self.head_dim, bias=config.attention_bias)
        self.k = nn.Linear(width, config.kv_width, bias=config.attention_bias)
        self.v = nn.Linear(width, config.kv_width, bias=config.attention_bias)
        self.gate = nn.Linear(width, inner, bias=config.mlp_bias)
        self.up = nn.Linear(width, inner, bias=config.mlp_bias)

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
        normed = self.attention_norm(x)
        q = self.turn(self.q(normed), self.query_norm, angles)
        k = self.turn(self.k(normed), self.key_norm, angles)
        keys, values = put_columns(tables[0], k, starts), put_columns(tables[1], self.v(normed), starts)
        if tile is None:
            attended = attend_columns(q, keys, values, mask, self.heads, self.kv_heads)
        else:
            attended = self.attend_in_tiles(q, keys, values, mask=mask, tile=tile)
        return self.feed_forward(x + self.out(attended)), keys, values

    def turn(self, heads: Tensor, norm: nn.Module | None, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate heads [B,T,heads*head_dim], normed before where the family does that."""
        if norm is not None:
            heads = norm(heads.unflatten(2, (-1, self.head_dim))).flatten(2)
        return onnx_operators.rotary_embedding(heads, *angles, num_heads=heads.shape[2] // self.head_dim)

    def attend_in_tiles(self, q: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor, tile: int) -> Tensor:
        """Ask q [B,T,heads*head_dim] by key head and in whole tiles; returns what has its shape.

        The heads that share a key head are queries of one attention, one after the other: each is the first of its
        key head, or the second, in the order that `own_projections` gave them.
        """
        batch, tokens, width = q.shape
        repeats = self.heads // self.kv_heads
        count = tokens * repeats
        asked = q.reshape(batch, count, self.kv_heads * self.head_dim)
        if repeats % tile:
            asked = asked.index_select(1, tiled(count, tile, q.device))
        answered = attend_columns(asked, keys, values, mask, self.kv_heads, self.kv_heads)
        if repeats % tile:
            # Picked by index, not sliced: a slice would make torch.export ask whether there is anything to cut.
            answered = answered.index_select(1, torch.arange(count, device=q.device))
        return answered.reshape(batch, tokens, width)

    def feed_forward(self, x: Tensor) -> Tensor:
        """See `Block.feed_forward`."""
        normed = self.feed_forward_norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


def own_projections(state: dict[str, Tensor], config: ModelConfig, *, in_tiles: bool) -> dict[str, Tensor]:
    """Make a resident decoder's weights of those of `Decoder`.  Raises RuntimeError for weights of another shape.

    Projections stand apart.  Queries come out scaled: ONNX Runtime packs all keys anew at every call of an attention
    that has to scale.  (64 columns of a head are scaled by a power of two, which changes no bit; others round once.)
    For tiles, the first heads of all key heads stand before their second ones, and so on.
    """
    made: dict[str, Tensor] = {}
    q_width, inner, scale = config.num_heads * config.head_dim, config.intermediate_size, config.head_dim**-0.5
    for name, weight in state.items():
        block, layer, kind = name.rsplit(".", 2) if name.startswith("blocks.") else ("", "", "")
        if layer == "qkv":
            q, k, v = weight.split((q_width, config.kv_width, config.kv_width))
            q = q if config.qk_norm else q * scale
            made[f"{block}.q.{kind}"] = _by_turn(q, config) if in_tiles else q
            made |= {f"{block}.k.{kind}": k, f"{block}.v.{kind}": v}
        elif layer == "gate_up":
            made[f"{block}.gate.{kind}"], made[f"{block}.up.{kind}"] = weight.split((inner, inner))
        elif layer == "query_norm":
            made[name] = weight * scale
        elif layer == "out" and kind == "weight" and in_tiles:
            made[name] = _by_turn(weight.T, config).T
        else:
            made[name] = weight
    return made


def _by_turn(rows: Tensor, config: ModelConfig) -> Tensor:
    """Order rows [heads*head_dim,...] so that the first head of each key head comes before every second one."""
    groups = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    return rows.unflatten(0, groups).transpose(0, 1).flatten(0, 2)


def tiled(count: int, tile: int, device: torch.device) -> Tensor:
    """Number `count` queries in whole tiles: the last one stands in for those that are missing."""
    return torch.arange((count + tile - 1) // tile * tile, device=device).clamp(max=count - 1)


class ResidentDecoder(Decoder):
    """The functional step over resident context; weights are those of `Decoder` as `own_projections` gives them.

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
        self, token_ids: Tensor, positions: Tensor, context_lengths: Tensor, wanted: Tensor, *tables: Tensor
    ) -> tuple[Tensor, ...]:
        """Run one step.

        token_ids, positions int64 [B,T], context_lengths int64 [B] with context_lengths[b] + T <= S.
        wanted int64 [B,W,1]: the tokens, counted in T, whose logits are wanted.
        tables [B,S,kv_heads*head_dim]: keys, then values of layer 0, of layer 1, ...; what stands in a row's columns
        from context_lengths[b] on is overwritten or not read, but must be numbers.
        Returns logits float32 [B,W,vocab], then the tables with the new columns.
        """
        x = self.embed(token_ids)
        angle = positions[..., None].to(torch.float32) * self.inverse_frequency
        angles = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        mask = self.mask(token_ids, context_lengths, columns=tables[0].shape[1])
        filled: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x, keys, values = cast(ResidentBlock, block).attend(
                x, angles, (tables[2 * index], tables[2 * index + 1]), context_lengths, mask=mask, tile=self.tile
            )
            filled += [keys, values]
        return self.head(self.norm(pick_tokens(x, wanted))).to(torch.float32), *filled

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
