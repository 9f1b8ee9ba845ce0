"""Which changed pin can explain a divergence?

Each pin acts on some layers, so the first layer that differs rules many pins out.  This names suspects by what pins
can do; which of several did it is answered by replaying with one of them changed at a time, not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from eval.divergence import Divergence
from eval.layers import LAYERS, Layer
from manifests.diff import PinDifference

Role = Literal["direct", "upstream", "downstream", "inert", "observed"]
"""direct: acts on the layer that differs first.  upstream: acts only on earlier layers, which were found equal or not
judged.  downstream: acts only on later layers, so it cannot have done this.  inert: changes no result.  observed: is
itself a result of the run."""

PIN_LAYERS: Mapping[str, tuple[Layer, ...]] = {
    "artifact": ("bits",),
    "artifact.model": (),
    "artifact.family": (),
    "artifact.tokenizer_digest": ("input", "token"),
    "artifact.preprocessing_digest": ("input",),
    "compiler": ("bits",),
    "compiler.runtime_versions.tokenizers": ("input",),
    "hardware": ("bits",),
    "hardware.cores": (),
    "hardware.memory_bytes": (),
    "hardware.kernel": (),
    "hardware.topology": (),
    "hardware.environment.AOTI_RUNTIME_CHECK_INPUTS": ("failure",),
    "hardware.environment.OMP_WAIT_POLICY": (),
    "hardware.environment.GOMP_SPINCOUNT": (),
    "hardware.library_versions.python": (),
    "hardware.library_versions.safetensors": (),
    "hardware.library_versions.tokenizers": ("input",),
    "scheduling": ("schedule",),
    "scheduling.engine_id": (),
    "generation": ("token",),
    "generation.max_tokens": ("schedule", "token"),
    "context": ("input",),
    "tools": ("tool",),
    "tools.tools": ("input", "tool"),
    "tools.authorization_version": ("decision",),
    "policy": ("decision",),
    "policy.output_schema_digest": ("token", "decision"),
}
"""Pin, or dimension for the rest of its pins, to the layers on which it acts first.  Bits by the measured list of what
changes them on a CPU; waiting policies, memory size and names were never seen to."""

OBSERVED = frozenset({"context.context_digest", "context.source_snapshots"})
"""Pins that say what a run found, not what it was told."""


@dataclass(frozen=True)
class Suspect:
    """One changed pin and what it may have to do with a divergence."""

    pin: PinDifference
    layers: tuple[Layer, ...]
    role: Role


@dataclass(frozen=True)
class Attribution:
    """All changed pins, the likeliest first."""

    suspects: tuple[Suspect, ...]
    explained: bool
    """Whether there is nothing to explain, or a pin that acts on the layer that differs first."""

    @property
    def direct(self) -> tuple[PinDifference, ...]:
        """Return the pins that can have done it."""
        return tuple(suspect.pin for suspect in self.suspects if suspect.role == "direct")


def layers_of(path: str) -> tuple[Layer, ...]:
    """Return the layers on which a pin acts, by its longest known prefix; all of them for an unknown dimension."""
    words = path.split(".")
    for length in range(len(words), 0, -1):
        known = PIN_LAYERS.get(".".join(words[:length]))
        if known is not None:
            return known
    return LAYERS


def attribute(differences: Sequence[PinDifference], divergence: Divergence) -> Attribution:
    """Rank the pins that differ between two runs by whether they can have caused the first difference."""
    suspects = [Suspect(pin, layers_of(pin.path), _role(pin, divergence.layer)) for pin in differences]
    order: list[Role] = ["direct", "upstream", "observed", "downstream", "inert"]
    ranked = tuple(sorted(suspects, key=lambda suspect: order.index(suspect.role)))
    explained = divergence.layer is None or any(suspect.role == "direct" for suspect in ranked)
    return Attribution(ranked, explained)


def _role(pin: PinDifference, layer: Layer | None) -> Role:
    if any(pin.path == name or pin.path.startswith(name + ".") for name in OBSERVED):
        return "observed"
    acts = layers_of(pin.path)
    if not acts:
        return "inert"
    if layer is None:
        return "upstream"
    if layer in acts or (layer == "margin" and "bits" in acts):
        return "direct"
    return "upstream" if min(map(LAYERS.index, acts)) < LAYERS.index(layer) else "downstream"
