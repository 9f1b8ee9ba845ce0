"""Which checkpoint do engines run to be compared?  Random parameters that any converter takes, by one recipe a size."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

VOCABULARY = 4096


class Size(NamedTuple):
    """One recipe, and what it gives under torch 2.13 for the CPU and transformers 5.5 to 5.23."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    parameters: str
    weights: str


SIZES = {
    "small": Size(256, 688, 4, 4, 2, "5.0M", "0e37cf5952bf1c5164a2eafff38bd9c95c6537a96db159fb803cc0497fcf5d8e"),
    "medium": Size(768, 2048, 8, 12, 4, "56.6M", "2157b598446f33f74e12f817f906fc1ce25872476d22d06875fc6905b79edbc5"),
}
"""In the small one an engine's own work weighs, in the medium one the model's."""


def comparison_checkpoint(folder: Path, size: str = "small") -> Path:
    """Write the checkpoint with a byte-level tokenizer into `folder`; refuse weights other than the recipe's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    _write_tokenizer(folder)
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != recipe.weights:
        raise RuntimeError(f"these versions of torch and transformers give other weights: {found}")
    return folder


def quiet_checkpoint(folder: Path, size: str = "small") -> Path:
    """Write it in a child: what its libraries print on import stays out of a table."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.comparison", str(folder), size]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the comparison checkpoint cannot be made: {done.stderr.strip().splitlines()[-1]}")
    return folder


def _write_tokenizer(folder: Path) -> None:
    """Converters want one; no token of the comparison is ever decoded."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = ("<pad>", "<s>", "</s>")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: index for index, name in enumerate((*specials, *letters))}
    merges: list[tuple[str, str]] = []
    for pair in ((one, other) for one in letters for other in letters):
        if len(vocabulary) == VOCABULARY:
            break
        vocabulary["".join(pair)] = len(vocabulary)
        merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "</s>"}))


if __name__ == "__main__":
    comparison_checkpoint(Path(sys.argv[1]), *sys.argv[2:])
