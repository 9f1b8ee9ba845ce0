"""The step over resident context computes what the gathered one does, for each family and every way to share heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runtime.models.loader import build_decoder, load_checkpoint
from runtime.models.random_checkpoint import random_checkpoint
from runtime.models.resident import put_columns

SLOTS = 29


@pytest.mark.parametrize("tile", [None, 2, 16])
@pytest.mark.parametrize(
    ("family", "kv_heads"), [("llama", 4), ("llama", 2), ("llama", 1), ("qwen2", 2), ("qwen3", 2), ("qwen3", 4)]
)
def test_it_answers_as_the_gathered_step(family: str, kv_heads: int, tile: int | None, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", family=family, num_kv_heads=kv_heads, seed=3)
    checkpoint = load_checkpoint(folder)
    config, draw = checkpoint.config, torch.Generator().manual_seed(0)
    k_pool, v_pool = (torch.randn(config.num_layers * SLOTS, config.kv_width, generator=draw) for _ in range(2))
    lengths = torch.tensor([9, 17, 0])
    slots = torch.randint(0, SLOTS, (3, 17), generator=draw)
    for count in (1, 5):
        ids = torch.randint(0, config.vocab_size, (3, count), generator=draw)
        positions = lengths[:, None] + torch.arange(count)
        logits, *new = build_decoder(checkpoint)(ids, positions, k_pool, v_pool, slots, lengths)
        wanted = torch.tensor([count - 1, 0])[None, :, None].expand(3, 2, 1)
        tables = torch.zeros(2 * config.num_layers, 3, 17 + count, config.kv_width)
        for side, pool in enumerate((k_pool, v_pool)):
            tables[side::2, :, :17] = pool.view(config.num_layers, SLOTS, -1)[:, slots]
        found, *filled = build_decoder(checkpoint, kind="resident", tile=tile)(ids, positions, lengths, wanted, *tables)
        torch.testing.assert_close(found, logits[:, [count - 1, 0]], atol=1e-5, rtol=0)
        for number, table in enumerate(filled):
            own = torch.stack([table[row, lengths[row] : lengths[row] + count] for row in range(3)])
            torch.testing.assert_close(own, new[number % 2][number // 2], atol=1e-5, rtol=0)


def test_columns_land_behind_each_rows_own_start() -> None:
    table = torch.zeros(2, 5, 1)
    filled = put_columns(table, torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([0, 3]))
    assert filled[:, :, 0].tolist() == [[1.0, 2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0, 4.0]]
    assert not table.any()
