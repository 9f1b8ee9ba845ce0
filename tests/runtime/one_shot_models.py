"""Real one-shot models, made by script with fixed seeds: classifiers of images and of vectors, a text embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.export import Dim

VOCABULARY, WIDTH, CLASSES = 97, 32, 5


class Classifier(nn.Module):
    """A small convolutional network over 8x8 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12 * 4 * 4, CLASSES)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = torch.relu(self.second(torch.relu(self.first(image)))).flatten(1)
        scores = self.head(features)
        return {"probabilities": scores.softmax(-1), "label": scores.argmax(-1)}


class Perceptron(nn.Module):
    """A classifier of vectors of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, CLASSES)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        scores = self.second(torch.relu(self.first(features)))
        return {"probabilities": scores.softmax(-1), "label": scores.argmax(-1)}


class Embedder(nn.Module):
    """One transformer layer over token ids, mean-pooled under a mask and scaled to length one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        seen = mask[:, None, None, :].to(torch.bool)
        state = self.tokens(token_ids)
        batch, length, _ = state.shape
        query, key, value = (
            part.reshape(batch, length, 4, WIDTH // 4).transpose(1, 2)
            for part in self.qkv(self.norm(state)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        state = state + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        state = state + self.down(torch.nn.functional.gelu(self.up(self.norm(state))))
        weights = mask.to(torch.float32)[:, :, None]
        pooled = (state * weights).sum(1) / weights.sum(1)
        return pooled / pooled.norm(dim=-1, keepdim=True)


def save_classifier(path: Path) -> Path:
    """Save the classifier of images as a program with a dynamic batch of 1 to 64."""
    torch.manual_seed(11)
    return _save(Classifier(), path, torch.randn(3, 1, 8, 8))


def save_perceptron(path: Path) -> Path:
    """Save the classifier of vectors as a program with a dynamic batch of 1 to 64."""
    torch.manual_seed(10)
    return _save(Perceptron(), path, torch.randn(3, 16))


def _save(module: nn.Module, path: Path, example: Tensor) -> Path:
    batch = {0: Dim("batch", min=1, max=64)}
    exported = torch.export.export(module.eval().requires_grad_(False), (example,), dynamic_shapes=(batch,))
    torch.export.save(exported, path)
    return path


def save_embedder(path: Path) -> Path:
    """Save the embedding model with dynamic batch and length."""
    torch.manual_seed(12)
    ids, mask = torch.randint(0, VOCABULARY, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    shape = {0: Dim("batch", min=1, max=32), 1: Dim("length", min=1, max=48)}
    exported = torch.export.export(
        Embedder().eval().requires_grad_(False), (ids, mask), dynamic_shapes={"token_ids": shape, "mask": shape}
    )
    torch.export.save(exported, path)
    return path


def save_onnx_classifier(path: Path, *, external: bool = False, opset: int = 20) -> Path:
    """Write a two-layer perceptron over vectors of 16 as an ONNX file, its weights outside if asked."""
    drawn = np.random.default_rng(13)
    weights = {
        "w1": drawn.normal(size=(16, 24)).astype(np.float32),
        "b1": drawn.normal(size=24).astype(np.float32),
        "w2": drawn.normal(size=(24, CLASSES)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gemm", ["features", "w1", "b1"], ["hidden"], name="first"),
        helper.make_node("Relu", ["hidden"], ["active"], name="relu"),
        helper.make_node("MatMul", ["active", "w2"], ["scores"], name="second"),
        helper.make_node("Softmax", ["scores"], ["probabilities"], name="softmax", axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="tests")
    model.ir_version = 10
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path
