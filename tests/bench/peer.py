"""How is one engine driven for the comparison?  A process that takes tasks as JSON lines, tells its CPU time.

    python -m tests.bench.peer KIND CHECKPOINT WORK

A task is {"batch", "length", "new", "seed"}: so many random prompts of one length, so many greedy tokens after each,
nothing ends early.  The answer is {"cpu_s", "tokens"}: CPU seconds of the whole process, and each row's tokens.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.comparison import VOCABULARY

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], list[list[int]]]
"""Prompts and new tokens a row to the new tokens of each row."""


def prompts_of(*, batch: int, length: int, seed: int) -> Prompts:
    """Draw a batch; the seed names it."""
    draw = random.Random(seed * 1000003 + batch * 1009 + length)
    return [[draw.randrange(300, VOCABULARY) for _ in range(length)] for _ in range(batch)]


def replaylab(checkpoint: Path, work: Path, *, backend: str, batch_invariant: bool) -> Generate:
    """This project's engine, recording into a ledger as it always does."""
    from manifests.scheduling import SchedulingManifest
    from runtime.backends.contract import Bounds
    from runtime.backends.protocol import BuildOptions
    from runtime.engine.generation import GenerationRequest, Sampling
    from runtime.engine.loop import Engine
    from runtime.prepare.load import load_package
    from runtime.prepare.pipeline import prepare
    from runtime.prepare.store import PackageStore
    from traces.recorder import Recorder

    store = PackageStore(work)
    bounds = Bounds(max_batch=32, max_tokens=1024, max_context=2048)
    options = BuildOptions(bounds=bounds, batch_invariant=batch_invariant)
    model = load_package(store, prepare(checkpoint, backend=backend, store=store, options=options).digest)
    scheduling = SchedulingManifest(
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        num_blocks=512,
        batch_sizes=(1, 8, 32),
        block_size=16,
    )
    recorder = Recorder(work, run_id="run_bench", component="engine")
    engine = Engine(model, scheduling, recorder)
    asked = iter(range(1 << 30))

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        sampling = Sampling(max_tokens=new)
        requests = [GenerationRequest(f"s{next(asked)}", "t", tuple(prompt), sampling) for prompt in prompts]
        return [list(handle.wait(300).tokens) for handle in [engine.submit(request) for request in requests]]

    return generate


def transformers(checkpoint: Path, work: Path) -> Generate:
    """`generate` of Hugging Face transformers, sdpa attention."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].tolist()

    return generate


def onnxruntime_genai(checkpoint: Path, work: Path) -> Generate:
    """ONNX Runtime GenAI on a model of its own builder."""
    import subprocess

    folder = work / "model"
    builder = [sys.executable, "-W", "ignore", "-m", "onnxruntime_genai.models.builder"]
    options = ["-i", str(checkpoint), "-o", str(folder), "-p", "fp32", "-e", "cpu", "-c", str(work / "cache")]
    done = subprocess.run([*builder, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"its model builder failed: {done.stderr.strip().splitlines()[-1]}")
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    path.write_text(json.dumps(config))
    import numpy as np
    import onnxruntime_genai as genai  # pyright: ignore[reportMissingImports]

    model = genai.Model(str(folder))

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        length = len(prompts[0])
        search = genai.GeneratorParams(model)
        search.set_search_options(
            batch_size=len(prompts), min_length=length + new, max_length=length + new, do_sample=False
        )
        generator = genai.Generator(model, search)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [list(map(int, generator.get_sequence(row)[length:])) for row in range(len(prompts))]

    return generate


def llama_cpp_python(checkpoint: Path, work: Path, *, flash: bool) -> Generate:
    """llama.cpp under its Python bindings, as it comes (flash attention) or in float32 throughout."""
    from tests.bench.llama import Decoder, write_gguf

    return Decoder(write_gguf(checkpoint, work / "model.gguf"), flash=flash).generate


KINDS: dict[str, Callable[[Path, Path], Generate]] = {
    "replaylab onnxruntime": lambda c, w: replaylab(c, w, backend="onnxruntime", batch_invariant=False),
    "replaylab onnxruntime, invariant": lambda c, w: replaylab(c, w, backend="onnxruntime", batch_invariant=True),
    "replaylab inductor": lambda c, w: replaylab(c, w, backend="inductor", batch_invariant=False),
    "replaylab inductor, invariant": lambda c, w: replaylab(c, w, backend="inductor", batch_invariant=True),
    "replaylab eager": lambda c, w: replaylab(c, w, backend="eager", batch_invariant=False),
    "replaylab eager, invariant": lambda c, w: replaylab(c, w, backend="eager", batch_invariant=True),
    "transformers": transformers,
    "onnxruntime-genai": onnxruntime_genai,
    "llama-cpp-python": lambda c, w: llama_cpp_python(c, w, flash=True),
    "llama-cpp-python, float32": lambda c, w: llama_cpp_python(c, w, flash=False),
}


def run_task(generate: Generate, task: dict[str, int]) -> dict[str, Any]:
    """Generate once on the clock of the whole process."""
    prompts = prompts_of(batch=task["batch"], length=task["length"], seed=task["seed"])
    began = time.process_time()
    rows = generate(prompts, task["new"])
    spent = time.process_time() - began
    if any(len(row) != task["new"] for row in rows):
        raise RuntimeError(f"asked for {task['new']} tokens a row, got {sorted({len(row) for row in rows})}")
    return {"cpu_s": spent, "tokens": rows}


def main(arguments: list[str]) -> int:
    """Make the engine, say so, then do one task a line until standard input ends."""
    kind, checkpoint, work = arguments[0], Path(arguments[1]), Path(arguments[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print must not disturb the answers
    try:
        generate = KINDS[kind](checkpoint, work)
        answers.write(json.dumps({"ready": kind}) + "\n")
        for line in sys.stdin:
            answers.write(json.dumps(run_task(generate, json.loads(line))) + "\n")
    except Exception as error:
        answers.write(json.dumps({"failed": f"{type(error).__name__}: {error}"}) + "\n")
        return 1
    answers.flush()
    os._exit(0)  # an engine's threads and a runtime's teardown are no part of the comparison


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
