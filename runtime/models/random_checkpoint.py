"""What can a test load without a trained model?  A small folder of random weights, repeatable by its seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def _shapes(raw: dict[str, Any], family: str) -> dict[str, tuple[int, ...]]:
    width, inner, head = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    rows = {"q": raw["num_attention_heads"] * head, "k": raw["num_key_value_heads"] * head}
    rows["v"] = rows["k"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (raw["vocab_size"], width),
        "model.norm.weight": (width,),
        "lm_head.weight": (raw["vocab_size"], width),
    }
    for index in range(raw["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        for name, size in rows.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (size, width)
            if family == "qwen2":
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (size,)
        if family == "qwen3":
            shapes[f"{layer}self_attn.q_norm.weight"] = (head,)
            shapes[f"{layer}self_attn.k_norm.weight"] = (head,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (width, rows["q"])
        shapes[f"{layer}mlp.gate_proj.weight"] = (inner, width)
        shapes[f"{layer}mlp.up_proj.weight"] = (inner, width)
        shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
        shapes[f"{layer}input_layernorm.weight"] = (width,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (width,)
    return shapes


def random_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    family: str = "llama",
    vocab_size: int = 320,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    max_positions: int = 512,
) -> Path:
    """Write config.json, model.safetensors and a byte tokenizer into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in _shapes(raw, family).items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if name.endswith("norm.weight") else noise * (0.6 / shape[-1] ** 0.5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    return folder


def byte_tokenizer(vocab_size: int) -> Any:
    """A byte-level tokenizer: 256 bytes first, then special tokens; unused ids up to `vocab_size` are reserved."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["pad", "begin", "end", "policy", "account", "user", "tool", "assistant"]
    names += [f"reserved{index}" for index in range(vocab_size - len(letters) - len(names))]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])
    return tokenizer
