"""Which code is the decoder?  In eager mode the source itself is what runs, so it is a pin like a library's version."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from manifests.canonical import digest

DECODER_SOURCE = "decoder_source"
"""The compiler manifest's flag, and the entry of a package's envelope, that hold the digest."""

MODULES = (
    "runtime.models.config",
    "runtime.models.layout",
    "runtime.models.decoder",
    "runtime.models.invariant",
    "runtime.backends.linears",
)
"""What computes the step: rotary frequencies, layouts, both decoders, packed linear layers."""


def decoder_source() -> str:
    """Name the text of these modules, whatever its line ends; none of them is imported."""
    texts = {name: _text(name) for name in MODULES}
    return digest("".join(f"# {name}\n{text}" for name, text in texts.items()).encode())


def _text(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module} has no source file")
    return Path(spec.origin).read_text(encoding="utf-8")  # universal newlines: a checkout's line ends do not count
