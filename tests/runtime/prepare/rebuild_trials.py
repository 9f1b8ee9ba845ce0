"""How often does each of nine stages give the same digest?  Rebuilds in fresh processes, counted stage by stage.

    python -m tests.runtime.prepare.rebuild_trials --backend onnxruntime --times 20
    python -m tests.runtime.prepare.rebuild_trials --backend inductor --precision bfloat16 --flag freezing=true

Each rebuild is a process of its own with a store of its own; PYTHONHASHSEED is left to chance.  Prints for every stage
how many distinct digests were seen, and, where it is more than one, the declaration that covers it or that none does.
Exit code 0 when all stages repeat or are declared not to, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from runtime.prepare.provenance import reproducible_of

STAGES = ("capture", "represent", "analyze", "optimize", "partition", "lower", "package", "load", "warm")
BOUNDS = ("--max-batch", "8", "--max-tokens", "16", "--max-context", "32")


def main() -> int:
    """Rebuild, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--flag", action="append", default=[])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--model", type=Path, help="a checkpoint folder (default: a tiny random one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="replaylab-trials-") as place:
        model = arguments.model or _tiny(Path(place) / "model")
        documents = [_rebuild(arguments, model, Path(place) / f"ledger-{turn}") for turn in range(arguments.times)]
    return _print(arguments, documents)


def _tiny(folder: Path) -> Path:
    from runtime.models.random_checkpoint import random_checkpoint

    return random_checkpoint(folder, seed=3, num_layers=1, hidden_size=32, intermediate_size=32, num_heads=2)


def _rebuild(arguments: argparse.Namespace, model: Path, ledger: Path) -> dict[str, Any]:
    words = [sys.executable, "-m", "replaylab", "prepare", str(model), "--backend", arguments.backend, *BOUNDS]
    words += ["--precision", arguments.precision, "--ledger", str(ledger), "--json"]
    words += [word for flag in arguments.flag for word in ("--flag", flag)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    answer = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900, check=False)
    if answer.returncode != 0:
        raise SystemExit(f"a rebuild failed: {answer.stdout[-800:]}{answer.stderr[-800:]}")
    return dict(json.loads(answer.stdout))


def _print(arguments: argparse.Namespace, documents: list[dict[str, Any]]) -> int:
    provenance = documents[0]["stages"][6]["record"]["build_provenance"]
    declared = reproducible_of(provenance)
    first = None if declared.get("reproducible", True) else int(str(declared["from_stage"])[1:])
    print(f"{arguments.backend} {arguments.precision} {' '.join(arguments.flag)}: {len(documents)} rebuilds")
    code = 0
    for place, name in enumerate(STAGES):
        seen = Counter(document["stages"][place]["output_digest"] for document in documents)
        said = ""
        if len(seen) > 1:
            covered = first is not None and place + 1 >= first
            said = f"  declared: {declared['reason']}" if covered else "  NOT DECLARED"
            code = code if covered else 1
        print(f"  a{place + 1:02d} {name:<10} {len(seen):>3} distinct{said}", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
