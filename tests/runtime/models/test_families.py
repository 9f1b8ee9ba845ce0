"""The functional step computes what transformers computes, for each family, whole and in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.models.config import ModelRefused, parse_config
from runtime.models.decoder import Decoder
from runtime.models.loader import build_decoder, load_checkpoint
from runtime.models.random_checkpoint import random_checkpoint

SLOTS = 64


def _theirs(folder: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


def _in_chunks(decoder: Decoder, tokens: Tensor, chunks: list[int]) -> Tensor:
    """Feed `tokens` [B,T] chunk by chunk, writing keys and values to scattered slots as the host would."""
    config, batch = decoder.config, tokens.shape[0]
    k_pool = torch.full((config.num_layers * SLOTS, config.kv_width), 9.0)
    v_pool = torch.full_like(k_pool, -9.0)
    own = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1)).view(batch, -1)
    out: list[Tensor] = []
    start = 0
    for size in chunks:
        positions = torch.arange(start, start + size).expand(batch, size).contiguous()
        lengths = torch.full((batch,), start)
        slots = own[:, : max(start, 1) + 2]  # wider than needed: only context_lengths may count
        with torch.no_grad():
            logits, new_k, new_v = decoder(tokens[:, start : start + size], positions, k_pool, v_pool, slots, lengths)
        out.append(logits)
        for layer in range(config.num_layers):
            rows = own[:, start : start + size] + layer * SLOTS
            k_pool[rows], v_pool[rows] = new_k[layer], new_v[layer]
        start += size
    return torch.cat(out, 1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_agree_with_transformers(family: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / family, family=family, seed=3)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = _theirs(folder, tokens)
    decoder = build_decoder(load_checkpoint(folder))
    for chunks in ([24], [10, 1, 13], [1] * 24):
        assert (_in_chunks(decoder, tokens, chunks) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {"tie_word_embeddings": True},
        {"attention_bias": False, "mlp_bias": False},
    ],
    ids=["linear", "llama3", "tied", "plain"],
)
def test_variants_agree_with_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", seed=5)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    if change.get("tie_word_embeddings"):
        weights = load_file(folder / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(2))
    ours = _in_chunks(build_decoder(load_checkpoint(folder)), tokens, [40])
    assert (ours - _theirs(folder, tokens)).abs().max() < 1e-4


def test_digest_names_the_bytes(tmp_path: Path) -> None:
    one = load_checkpoint(random_checkpoint(tmp_path / "a", seed=1)).digest
    assert one == load_checkpoint(random_checkpoint(tmp_path / "b", seed=1)).digest
    assert one != load_checkpoint(random_checkpoint(tmp_path / "c", seed=2)).digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"use_sliding_window": True, "sliding_window": 128}, "sliding-window"),
        ({"hidden_size": "wide"}, "malformed"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    raw = json.loads((random_checkpoint(tmp_path / "model") / "config.json").read_text())
    with pytest.raises(ModelRefused, match=words):
        parse_config(raw | change)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="no config"):
        load_checkpoint(tmp_path)
    folder = random_checkpoint(tmp_path / "model")
    checkpoint = load_checkpoint(folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelRefused, match="changed"):
        build_decoder(checkpoint)
    weights.write_bytes(b"junk")
    with pytest.raises(ModelRefused, match="safetensors"):
        build_decoder(load_checkpoint(folder))
    weights.unlink()
    with pytest.raises(ModelRefused, match="lacks"):
        load_checkpoint(folder)
