"""What shape has this model?  One frozen description for the Llama, Qwen2 and Qwen3 families.

Errors, all `ModelRefused`: an architecture, activation, rotary scaling or attention window that the functional step
does not compute is refused with its name; it is never approximated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traces.failures import ClassifiedError, FailureClass

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


class ModelRefused(ClassifiedError):
    """A checkpoint that this runtime cannot load faithfully."""

    def __init__(self, message: str, *, fix: str, evidence: Mapping[str, Any] | None = None) -> None:
        super().__init__(
            message,
            failure_class=FailureClass.ARTIFACT_COMPATIBILITY,
            stage="a01",
            evidence={"validation_output": message, **(evidence or {})},
            fix=fix,
            error_type="model_refused",
        )


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """Position scaling of the rotary embedding; `kind` is default, linear or llama3."""

    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The numbers that fix every tensor shape of a decoder."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RotaryScaling = RotaryScaling()
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    attention_bias: bool = False
    """Bias on the query, key and value projections."""
    output_bias: bool = False
    """Bias on the attention output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each head's query and key before rotation (Qwen3)."""
    max_positions: int = 2048

    @property
    def kv_width(self) -> int:
        """Columns of one row of the flat key pool and of the flat value pool."""
        return self.num_kv_heads * self.head_dim


def _rotary(raw: Mapping[str, Any]) -> tuple[float, RotaryScaling]:
    # transformers 5 writes rope_parameters; earlier files have rope_theta and rope_scaling.
    parameters: Mapping[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    if kind not in ("default", "linear", "llama3"):
        raise ModelRefused(
            f"rotary scaling {kind!r} is not supported",
            fix="use a checkpoint with default, linear or llama3 rotary scaling",
            evidence={"rope_type": kind},
        )
    return theta, RotaryScaling(
        kind=kind,
        factor=float(parameters.get("factor", 1.0)),
        low_frequency_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_frequency_factor=float(parameters.get("high_freq_factor", 4.0)),
        original_max_positions=int(parameters.get("original_max_position_embeddings", 8192)),
    )


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face `config.json` document, refusing what the functional step does not compute."""
    architectures = list(raw.get("architectures") or [])
    family = next((FAMILIES[name] for name in architectures if name in FAMILIES), None)
    if family is None:
        raise ModelRefused(
            f"architecture {architectures or 'unnamed'} is not one of {', '.join(FAMILIES)}",
            fix="point at a Llama, Qwen2 or Qwen3 checkpoint folder",
            evidence={"architectures": architectures},
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelRefused(f"activation {raw['hidden_act']!r} is not silu", fix="use a checkpoint with silu")
    if raw.get("use_sliding_window") and raw.get("sliding_window"):
        raise ModelRefused("sliding-window attention is not supported", fix="use a full-attention checkpoint")
    try:
        theta, scaling = _rotary(raw)
        hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        bias = bool(raw.get("attention_bias", False))
        return ModelConfig(
            family=family,
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=True if family == "qwen2" else bias,
            output_bias=bias if family != "qwen2" else False,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            max_positions=int(raw.get("max_position_embeddings", 2048)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelRefused(
            f"config.json is incomplete or malformed: {error!r}", fix="restore the checkpoint's config.json"
        ) from error


def read_config(folder: Path) -> ModelConfig:
    """Read and check `folder/config.json`."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelRefused(
            f"{folder} has no config.json", fix="give the folder of a Hugging Face checkpoint"
        ) from error
    except ValueError as error:
        raise ModelRefused(f"{path} is not JSON: {error}", fix="restore the checkpoint's config.json") from error
    if not isinstance(raw, dict):
        raise ModelRefused(f"{path} is not a JSON object", fix="restore the checkpoint's config.json")
    return parse_config(raw)


def inverse_frequencies(config: ModelConfig) -> list[float]:
    """Rotary angle per position for each pair of a head's columns, length head_dim / 2 (RoFormer; Llama 3 scaling)."""
    half = config.head_dim // 2
    plain = [config.rope_theta ** (-2.0 * i / config.head_dim) for i in range(half)]
    scaling = config.rope_scaling
    if scaling.kind == "default":
        return plain
    if scaling.kind == "linear":
        return [f / scaling.factor for f in plain]
    low = scaling.original_max_positions / scaling.low_frequency_factor
    high = scaling.original_max_positions / scaling.high_frequency_factor
    out: list[float] = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength > low:
            out.append(frequency / scaling.factor)
        elif wavelength < high:
            out.append(frequency)
        else:
            smooth = (scaling.original_max_positions / wavelength - scaling.low_frequency_factor) / (
                scaling.high_frequency_factor - scaling.low_frequency_factor
            )
            out.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return out
