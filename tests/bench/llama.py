"""How is llama.cpp driven for the comparison?  Through its own C interface, on a GGUF file that this file writes.

Its converter refuses a byte-level tokenizer that it does not know, so the checkpoint is written here: float32 tensors,
and the rows of q and k in the order of its interleaved rotation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 8192
"""Cells of the one cache that all sequences share."""
ROWS = 32
BATCH = 4096
BLOCK_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHER_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder (heads * head_dim, width) from half rotation, pairs (i, i + head_dim/2), to pairs (2i, 2i + 1)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def tensors(checkpoint: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Give the checkpoint's tensors under GGUF names."""
    from safetensors.numpy import load_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, value in load_file(checkpoint / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module in OTHER_TENSORS:
            yield f"{OTHER_TENSORS[module]}.weight", value
            continue
        layer, _, part = module.removeprefix("model.layers.").partition(".")
        kind = BLOCK_TENSORS[part]
        yield f"blk.{layer}.{kind}.weight", interleaved(value, heads[kind]) if kind in heads else value


def write_gguf(checkpoint: Path, path: Path) -> Path:
    """Write a Llama checkpoint with a byte-level tokenizer as GGUF."""
    import gguf  # pyright: ignore[reportMissingImports]

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text()))
    for name, value in tensors(checkpoint, config):
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any]) -> None:
    from gguf import TokenType  # pyright: ignore[reportMissingImports]

    vocabulary = tokenizer["model"]["vocab"]
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([TokenType.CONTROL if name in special else TokenType.NORMAL for name in names])
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    )
    writer.add_pad_token_id(vocabulary["<pad>"])
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])


class Decoder:
    """One context of one thread; a batch of rows is one call, greedy.

    Its flash attention, the default, is faster and rounds to half precision: on the comparison checkpoint logits err by
    1e-3, and one prompt in ten gets other tokens.  Without it they err by 4e-7.
    """

    def __init__(self, path: Path, *, flash: bool) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self._c: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp does not load the model file")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = CONTEXT, BATCH, 512, ROWS
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.kv_unified = True
        if not flash:
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context of these settings")
        self._width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Give each row's next tokens."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        length = len(prompts[0])
        rows = range(len(prompts))
        last = [index == length - 1 for _ in rows for index in range(length)]
        sequences = [row for row in rows for _ in range(length)]
        steps = [self._step(np.concatenate(prompts), np.tile(np.arange(length), len(prompts)), sequences, last)]
        for position in range(length, length + new - 1):
            places = np.full(len(prompts), position)
            steps.append(self._step(steps[-1], places, list(rows), [True] * len(prompts)))
        return np.stack(steps, axis=1).tolist()

    def _step(self, tokens: np.ndarray, positions: np.ndarray, sequences: list[int], wanted: list[bool]) -> np.ndarray:
        """Compute these tokens, and choose the likeliest after each wanted one."""
        count = len(sequences)
        self._batch.n_tokens = count
        for name, values in {"token": tokens, "pos": positions, "n_seq_id": 1, "logits": wanted}.items():
            np.ctypeslib.as_array(getattr(self._batch, name), (count,))[:] = values
        for index, sequence in enumerate(sequences):
            self._batch.seq_id[index][0] = sequence
        if code := self._c.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode of {count} tokens answered {code}")
        logits = np.ctypeslib.as_array(self._c.llama_get_logits(self._context), (sum(wanted), self._width))
        return logits.argmax(axis=1)
