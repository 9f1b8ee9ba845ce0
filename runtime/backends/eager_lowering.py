"""How is a model prepared for eager torch?  Nothing is rewritten: weights are packed, the code is the decoder."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from manifests.canonical import digest
from runtime.backends import program as programs
from runtime.backends.contract import InputContract
from runtime.backends.decoder_source import DECODER_SOURCE, decoder_source
from runtime.backends.eager import WEIGHTS, EagerExecutor, eager_executor
from runtime.backends.eager_one_shot import PROGRAM, EagerOneShot
from runtime.backends.errors import BackendRefused
from runtime.backends.fixture import require_within
from runtime.backends.invariant import recipe_of
from runtime.backends.lowering import ExportedLowering, target, unknown
from runtime.backends.one_shot import OneShotSpec
from runtime.backends.protocol import Boundary, LoadSpec
from runtime.backends.saved_program import call_program


class EagerLowering(ExportedLowering):
    """Stages 4 to 6 for eager torch."""

    backend = "eager"

    def optimize(self) -> Boundary:
        """Stage 4: no rewriting; the numerical validation shows what the precision alone costs."""
        program = self.program
        nodes = {"nodes": len(program.exported.graph.nodes)}
        comparison = self.compare(self._executor())
        require_within(comparison, stage="a04")
        record = {
            "pass_list": [],
            "graph_before": nodes,
            "graph_after": nodes,
            "numerical_validation": comparison.document(),
            "estimated_memory_bytes": {"weights": sum(tensor.nbytes for tensor in self._weights().values())},
            "optimization_us": unknown("eager torch runs no graph pass, so there is nothing to time"),
        }
        return Boundary({"graph": digest(str(program.exported.graph).encode()), "passes": []}, record)

    def partition(self) -> Boundary:
        """Stage 5: one owner for everything."""
        operators = programs.histogram(self.program.exported)
        count = sum(operators.values())
        record = {
            "partition_map": {"aten-cpu": {"nodes": count, "operators": operators}},
            "fallback_node_count": 0,
            "transfer_edges": [],
            "provider_versions": {"aten-cpu": self.versions["torch"]},
            "estimated_copy_bytes": 0,
        }
        return Boundary({"partition": {"aten-cpu": count}}, record)

    def lower(self) -> Boundary:
        """Stage 6: select prebuilt kernels; write the weights."""
        start = time.perf_counter_ns()
        path = self.work / self._file
        if self.step_program is None:
            path.write_bytes(self.program.serialized)
        else:
            save_file(self._weights(), path, metadata={"format": "pt"})
        spent = (time.perf_counter_ns() - start) // 1000
        weights = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        source = self._source()
        record = {
            "target": target(),
            "compiler_flags": unknown("no compiler runs; torch selects prebuilt kernels at every call"),
            "code_size_bytes": unknown(f"the code is {self._code} and libtorch's prebuilt kernels"),
            "tuning_record": unknown("eager torch does not tune"),
            "kernel_inventory": {
                "operators": programs.histogram(self.program.exported),
                "linear": self._linear(),
                **source,
                "mkldnn": str(torch.backends.mkldnn.is_available()).lower(),
            },
            "build_us": spent,
        }
        emitted = {"weights": weights, "source": source.get(DECODER_SOURCE, self.program.digest)}
        return Boundary(emitted, record, {"build_us": spent})

    def _linear(self) -> str:
        if self.options.batch_invariant and recipe_of(self.options.flags) == "tile":
            return "onednn packed"
        return "mkl sgemm" if self.options.precision == "float32" else "onednn"

    def files(self) -> Mapping[str, Path]:
        """A decoder's weights in safetensors; a saved program as it was saved."""
        return {self._file: self.work / self._file}

    def compiler(self) -> Mapping[str, Any]:
        """The decoder's source is a flag of its own: another source is another compiler."""
        base = self.base_compiler()
        base["flags"] = {**base["flags"], **self._source()}
        return {**base, "backend_version": self.versions["torch"], "optimization_level": "none"}

    @property
    def _code(self) -> str:
        return "the captured program" if self.step_program is None else "the Python decoder"

    @property
    def _file(self) -> str:
        return PROGRAM if self.step_program is None else WEIGHTS

    def _weights(self) -> dict[str, torch.Tensor]:
        step = self.step_program
        return dict(self.program.exported.state_dict if step is None else step.decoder.state_dict())

    def _source(self) -> dict[str, str]:
        return {} if self.step_program is None else {DECODER_SOURCE: decoder_source()}

    def _executor(self) -> EagerExecutor | EagerOneShot:
        threads, step, model = self.options.threads, self.step_program, self.one_shot()
        if step is not None:
            config = step.decoder.config
            contract = InputContract.of(config, self.options.bounds)
            precision = self.options.precision
            spec = LoadSpec(
                config=config,
                contract=contract,
                precision=precision,
                threads=threads,
                flags=self.options.flags,
                batch_invariant=self.options.batch_invariant,
            )
            return eager_executor(copy.deepcopy(step.decoder), spec)
        if model is None:
            raise BackendRefused("stage a01 has not run", fix="call the stages in order")
        spec = OneShotSpec(contract=model.contract, precision=model.precision, threads=threads)
        return EagerOneShot(call_program(self.program.exported), spec)
