"""How does a Hugging Face folder become the functional step?  Digests first, safetensors only, weights fused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.models.config import ModelConfig, ModelRefused, read_config
from runtime.models.decoder import Decoder, NormKind, WholeRowDecoder
from runtime.models.invariant import InvariantDecoder
from runtime.models.resident import ResidentDecoder, own_projections

StepKind = Literal["plain", "whole_rows", "resident"]
"""How a decoder reads its context: by head from a view of the pool; as `decoder.WholeRowDecoder`, where no backend has
a step with a tile; as `resident.ResidentDecoder`."""

IDENTITY_FILES = ("config.json", "tokenizer.json")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model folder whose bytes are named by digests."""

    folder: Path
    config: ModelConfig
    weight_files: tuple[Path, ...]
    digest: str
    """sha256 over the sorted (file name, file digest) lines of configuration, tokenizer and weights."""
    file_digests: dict[str, str]
    tokenizer_path: Path | None

    def weights(self) -> dict[str, Tensor]:
        """Read all tensors, by their Hugging Face names, as float32.  Files changed since the digest are refused."""
        tensors: dict[str, Tensor] = {}
        for path in self.weight_files:
            if _sha256(path) != self.file_digests[path.name]:
                raise ModelRefused(f"{path} changed while it was being loaded", fix="start again")
            try:
                with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        tensors[name] = file.get_tensor(name).to(torch.float32)
            except (SafetensorError, OSError) as error:
                raise ModelRefused(f"{path} is not a readable safetensors file: {error}", fix="restore it") from error
        return tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ModelRefused(f"{index} points outside its folder", fix="restore the checkpoint's index")
        files = tuple(folder / name for name in names)
    else:
        files = (folder / "model.safetensors",)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelRefused(
            f"{folder} lacks {', '.join(missing)}",
            fix="give a folder with safetensors weights (other weight formats can run code and are refused)",
            evidence={"missing": missing},
        )
    return files


def load_checkpoint(folder: Path) -> Checkpoint:
    """Describe a checkpoint folder: configuration checked, every file digested, nothing of the weights parsed yet."""
    config = read_config(folder)
    weight_files = _weight_files(folder)
    named = [folder / name for name in IDENTITY_FILES if (folder / name).is_file()]
    digests = {path.name: _sha256(path) for path in (*named, *weight_files)}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    tokenizer = folder / "tokenizer.json"
    return Checkpoint(
        folder=folder,
        config=config,
        weight_files=weight_files,
        digest="sha256:" + hashlib.sha256(lines.encode()).hexdigest(),
        file_digests=digests,
        tokenizer_path=tokenizer if tokenizer.is_file() else None,
    )


def _layer_weights(source: dict[str, Tensor], config: ModelConfig, index: int) -> dict[str, Tensor]:
    theirs, ours = f"model.layers.{index}.", f"blocks.{index}."

    def join(parts: list[str], suffix: str) -> Tensor:
        return torch.cat([source.pop(f"{theirs}{part}.{suffix}") for part in parts])

    attention = [f"self_attn.{name}_proj" for name in ("q", "k", "v")]
    gated = ["mlp.gate_proj", "mlp.up_proj"]
    out = {
        f"{ours}attention_norm.weight": source.pop(f"{theirs}input_layernorm.weight"),
        f"{ours}feed_forward_norm.weight": source.pop(f"{theirs}post_attention_layernorm.weight"),
        f"{ours}qkv.weight": join(attention, "weight"),
        f"{ours}out.weight": source.pop(f"{theirs}self_attn.o_proj.weight"),
        f"{ours}gate_up.weight": join(gated, "weight"),
        f"{ours}down.weight": source.pop(f"{theirs}mlp.down_proj.weight"),
    }
    if config.attention_bias:
        out[f"{ours}qkv.bias"] = join(attention, "bias")
    if config.output_bias:
        out[f"{ours}out.bias"] = source.pop(f"{theirs}self_attn.o_proj.bias")
    if config.mlp_bias:
        out[f"{ours}gate_up.bias"] = join(gated, "bias")
        out[f"{ours}down.bias"] = source.pop(f"{theirs}mlp.down_proj.bias")
    if config.qk_norm:
        out[f"{ours}query_norm.weight"] = source.pop(f"{theirs}self_attn.q_norm.weight")
        out[f"{ours}key_norm.weight"] = source.pop(f"{theirs}self_attn.k_norm.weight")
    return out


def new_decoder(
    config: ModelConfig,
    precision: str = "float32",
    *,
    norm: NormKind = "fused",
    tile: int | None = None,
    kind: StepKind = "plain",
) -> Decoder:
    """Make the functional step without weights; with a tile, the one whose rows' bits are their own."""
    if kind == "resident":
        return ResidentDecoder(config, precision, norm=norm, tile=tile)
    if tile is None:
        return (WholeRowDecoder if kind == "whole_rows" else Decoder)(config, precision, norm=norm)
    return InvariantDecoder(config, precision, norm=norm, tile=tile)


def build_decoder(
    checkpoint: Checkpoint,
    precision: str = "float32",
    *,
    norm: NormKind = "fused",
    tile: int | None = None,
    kind: StepKind = "plain",
) -> Decoder:
    """Fill the functional step with a checkpoint's weights; a missing, spare or misshapen tensor is refused by name."""
    config, source = checkpoint.config, checkpoint.weights()
    try:
        embedding = source.pop("model.embed_tokens.weight")
        # A head of its own wins over the tie, as in transformers.
        tied = config.tie_embeddings and "lm_head.weight" not in source
        head = embedding if tied else source.pop("lm_head.weight")
        state = {"embed.weight": embedding, "head.weight": head, "norm.weight": source.pop("model.norm.weight")}
        for index in range(config.num_layers):
            state |= _layer_weights(source, config, index)
    except KeyError as error:
        raise ModelRefused(f"the checkpoint lacks the tensor {error}", fix="restore the weights") from error
    spare = sorted(name for name in source if not name.endswith("rotary_emb.inv_freq"))
    if spare:
        raise ModelRefused(
            f"the checkpoint has {len(spare)} tensors this architecture does not use, first {spare[0]!r}",
            fix="check that config.json belongs to these weights",
            evidence={"unused": spare[:20]},
        )
    decoder = new_decoder(config, precision, norm=norm, tile=tile, kind=kind)
    try:
        if kind == "resident":
            state = own_projections(state, config, in_tiles=tile is not None)
        decoder.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ModelRefused(f"weights do not fit config.json: {error}", fix="restore the weights") from error
    return decoder.eval().requires_grad_(False)
