"""What kind of model lies at a path, and what names it?  A checkpoint folder, a saved program, or an ONNX file.

Every byte that the model consists of is digested before any parser of a backend sees it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from runtime.models.config import ModelRefused


class ModelKind(StrEnum):
    """The three forms in which a model can be given."""

    CHECKPOINT = "checkpoint"
    """A Hugging Face folder of a decoder: served token by token through the paged engine."""
    PROGRAM = "torch-export"
    """A `.pt2` that `torch.export.save` wrote: one call, one answer."""
    ONNX = "onnx"
    """An ONNX file with its external data beside it: one call, one answer."""

    @property
    def one_shot(self) -> bool:
        """Whether one call answers a request whole."""
        return self is not ModelKind.CHECKPOINT


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model as it was found."""

    path: Path
    """The checkpoint's folder, or the file."""
    kind: ModelKind
    digest: str
    """Of a checkpoint's or an ONNX model's files by name; of a saved program's bytes."""

    @property
    def name(self) -> str:
        """What people call it; it pins nothing."""
        path = self.path.resolve()
        return path.name if self.kind is ModelKind.CHECKPOINT else path.stem


def kind_of(path: Path) -> tuple[ModelKind, Path]:
    """Tell a model's form from its name, and where it really lies; a folder may hold exactly one ONNX file."""
    if path.suffix == ".onnx":
        return ModelKind.ONNX, _existing(path)
    if path.suffix == ".pt2":
        return ModelKind.PROGRAM, _existing(path)
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(entry for entry in path.iterdir() if entry.suffix in (".onnx", ".pt2"))
        if len(found) == 1:
            return kind_of(found[0])
        if found:
            raise ModelRefused(
                f"{path} holds {len(found)} models: {', '.join(entry.name for entry in found)}",
                fix="name the file",
                evidence={"operator_details": [entry.name for entry in found]},
            )
    if path.is_file():
        raise ModelRefused(
            f"{path.name} is neither an .onnx file nor a .pt2 program",
            fix="give a checkpoint folder, an .onnx file or a .pt2 that torch.export.save wrote",
            evidence={"operator_details": path.suffix},
        )
    if not path.exists():
        raise ModelRefused(f"there is no {path}", fix="check the path", evidence={"operator_details": path.name})
    return ModelKind.CHECKPOINT, path


def identify(path: Path) -> ModelSource:
    """Name a model by kind and digest.  Errors: `ModelRefused`."""
    kind, place = kind_of(path)
    if kind is ModelKind.CHECKPOINT:
        from runtime.models.loader import load_checkpoint

        return ModelSource(path=place, kind=kind, digest=load_checkpoint(place).digest)
    if kind is ModelKind.ONNX:
        from runtime.models.onnx_file import read_onnx

        return ModelSource(path=place, kind=kind, digest=read_onnx(place).digest)
    return ModelSource(path=place, kind=kind, digest=file_digest(place))


def file_digest(path: Path) -> str:
    """Name a file by its bytes."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ModelRefused(f"there is no file {path}", fix="check the path", evidence={"operator_details": path.name})
    return path
