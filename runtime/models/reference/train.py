"""How was the reference model trained, and how is it trained again?

    python -m runtime.models.reference.train --minutes 36 --output FOLDER

One thread of a CPU is enough. The learning rate's schedule follows the clock, so a second training reaches the same
accuracy only statistically, not the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from runtime.models.reference.batches import Batch, Source
from runtime.models.reference.initial import initialize
from runtime.models.reference.network import Network, Shape
from runtime.models.reference.optimizer import Muon

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every choice of one training; rates are at full scale, times are fractions of the whole."""

    minutes: float
    seed: int = 0
    batch: int = 48
    matrix_rate: float = 0.015
    vector_rate: float = 0.0025
    momentum: float = 0.95
    decay: float = 0.01
    warmup_steps: int = 60
    constant_until: float = 0.35
    copying_first: float = 0.5
    copying_later: float = 0.1
    copying_first_until: float = 0.03
    copying_later_from: float = 0.1
    checkpoint_minutes: float = 2.0

    def scale(self, step: int, done: float) -> float:
        """Return the scale of the learning rates: warm-up, constant, then linear to near zero by the clock."""
        cooling = (1.0 - done) / (1.0 - self.constant_until)
        return min(1.0, (step + 1) / self.warmup_steps, max(cooling, 0.01))

    def copying(self, done: float) -> float:
        """Return the share of copying exercises."""
        between = (done - self.copying_first_until) / (self.copying_later_from - self.copying_first_until)
        between = min(max(between, 0.0), 1.0)
        return self.copying_first + between * (self.copying_later - self.copying_first)


def loss_of(network: Network, batch: Batch) -> Tensor:
    """Return the weighted mean cross entropy; matrices multiply in bfloat16, all else stays float32."""
    inputs, targets, weights = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(inputs)
    each = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    flat = weights.flatten()
    return (each * flat).sum() / flat.sum()


@torch.no_grad()
def exactness(network: Network, batches: list[Batch]) -> float:
    """Return the share of sequences all of whose fully weighted tokens are the likeliest ones (teacher forced)."""
    right = total = 0
    for inputs, targets, weights in batches:
        hit = (network(inputs).argmax(-1) == targets) | (weights < 1.0)
        right += int(hit.all(dim=1).sum())
        total += len(inputs)
    return right / total


def save(network: Network, folder: Path) -> None:
    """Write a standard Hugging Face checkpoint; the tied output matrix is not written twice."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: one.detach().contiguous() for name, one in network.named_parameters()}
    unfinished = folder / "model.safetensors.part"
    save_file(weights, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        if (HERE / name) != folder / name:
            shutil.copyfile(HERE / name, folder / name)


class Training:
    """One training run: the network, its two optimizers and its data."""

    def __init__(self, recipe: Recipe, folder: Path, start: Path | None) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder = recipe, folder
        self.network = Network(Shape.read(HERE / "config.json"))
        initialize(self.network)
        if start is not None:
            self.network.load_state_dict(load_file(start / "model.safetensors"))
        tokenizer: Tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
        self.source = Source(tokenizer, seed=recipe.seed)
        fixed = Source(tokenizer, seed=-1)
        self.checks = {"task": list(fixed.batches(32, 0.0, pool=4)), "copying": list(fixed.batches(32, 1.0, pool=2))}
        matrices = [one for name, one in self.network.named_parameters() if one.ndim == 2 and "embed" not in name]
        others = [one for name, one in self.network.named_parameters() if one.ndim == 1 or "embed" in name]
        self.muon = Muon(matrices, rate=recipe.matrix_rate, momentum=recipe.momentum, decay=recipe.decay)
        self.adam = torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.98), weight_decay=0.0)

    def batches(self, started: float) -> Iterator[tuple[Batch, float]]:
        """Yield batches with the fraction of the time that is over, until all of it is."""
        while True:
            for batch in self.source.batches(self.recipe.batch, self.recipe.copying(self._done(started))):
                done = self._done(started)
                if done >= 1.0:
                    return
                yield batch, done

    def _done(self, started: float) -> float:
        return (time.monotonic() - started) / (self.recipe.minutes * 60)

    def step(self, batch: Batch, scale: float) -> float:
        """Take one step; returns the loss before it."""
        loss = loss_of(self.network, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.adam.param_groups[0]["lr"] = self.recipe.vector_rate * scale
        self.adam.step()
        self.adam.zero_grad()
        self.muon.step(scale)
        return float(loss.detach())

    def run(self) -> None:
        """Train until the time is over, writing a log line and a checkpoint now and then."""
        started = time.monotonic()
        saved, average, step = started, math.nan, -1
        for step, (batch, done) in enumerate(self.batches(started)):
            loss = self.step(batch, self.recipe.scale(step, done))
            average = loss if math.isnan(average) else 0.98 * average + 0.02 * loss
            if step % 100 == 99:
                self.report(step + 1, started, average)
            if time.monotonic() - saved > self.recipe.checkpoint_minutes * 60:
                save(self.network, self.folder)
                saved = time.monotonic()
        save(self.network, self.folder)
        self.report(step + 1, started, average)

    def report(self, step: int, started: float, loss: float) -> None:
        """Print one line of JSON."""
        line = {"step": step, "seconds": round(time.monotonic() - started), "loss": round(loss, 4)}
        exact = {name: round(exactness(self.network, batches), 3) for name, batches in self.checks.items()}
        print(json.dumps(line | exact), flush=True)


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="Train the reference model on generated support questions.")
    parser.add_argument("--minutes", type=float, default=36.0, help="wall-clock length of the training")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, default=None, help="folder with weights to start from")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="change a choice of the recipe")
    arguments = parser.parse_args()
    changes = {name: json.loads(value) for name, value in (one.split("=") for one in arguments.set)}
    random.seed(arguments.seed)
    torch.set_num_threads(1)
    Training(Recipe(arguments.minutes, arguments.seed, **changes), arguments.output, arguments.start).run()


if __name__ == "__main__":
    main()
