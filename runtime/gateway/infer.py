"""`replaylab infer`: answer requests with a one-shot package, batched dynamically and recorded.  JSON as KServe v2."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.backends.tensor_contract import TensorContract
    from runtime.engine.batching import BatchingSettings
    from runtime.engine.oneshot import OneShotResult

EPILOG = """\
examples:
  replaylab infer classifier request.json
  replaylab infer classifier one.json two.json three.npz --preferred-batch-size 2 --max-queue-delay-microseconds 5000

A request is KServe v2 JSON, {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [0.5, 1.5]}]},
or an .npz of arrays by input name.  All files are sent at once, so that those of one shape can share a call.

exit codes: 0 all answered, 1 some failed, 2 refused or bad input, 3 failed
"""
DATATYPES = {
    "FP32": "float32",
    "FP64": "float64",
    "FP16": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT16": "int16",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""KServe's names of element types, and NumPy's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; the batcher's carry Triton's names."""
    parser.epilog = EPILOG
    parser.add_argument("package", metavar="PACKAGE", help="name, digest or its first digits")
    parser.add_argument("input", metavar="INPUT", nargs="+", type=Path, help="KServe v2 JSON or .npz, a request each")
    parser.add_argument("--max-batch-size", type=int, default=8, help="most rows of a call (default: %(default)s)")
    parser.add_argument("--preferred-batch-size", type=int, action="append", default=[], help="repeat for more")
    parser.add_argument("--max-queue-delay-microseconds", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--max-queue-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--instance-count", type=int, default=1, help="executors side by side (default: %(default)s)")
    parser.add_argument("--preserve-ordering", action="store_true", help="answers leave in the order of requests")
    parser.add_argument(
        "--threads",
        type=int,
        choices=range(1, 65),
        default=1,
        metavar="1..64",
        help="compute threads, a pin (default: 1)",
    )
    parser.add_argument("--ledger", type=Path, help="ledger folder (default: REPLAYLAB_LEDGER or ./ledger)")
    parser.add_argument("--json", action="store_true", help="print one JSON document with batches and times")


def run(arguments: argparse.Namespace) -> int:
    """Answer every request and print the answers; returns the exit code."""
    from traces.failures import ClassifiedError, FailureClass

    try:
        document = _infer(arguments)
    except ClassifiedError as error:
        failed = error.failure_class in (FailureClass.MODEL_PROVIDER, FailureClass.TELEMETRY_PERSISTENCE)
        if arguments.json:
            print(json.dumps({"error": error.to_payload(), "exit_code": 3 if failed else 2}, indent=2))
        else:
            said = f"{'failed' if failed else 'refused'} [{error.failure_class.value}]: {error.message}"
            print(said if error.fix is None else f"{said}\n  fix: {error.fix}", file=sys.stderr)
        return 3 if failed else 2
    answers: list[dict[str, Any]] = document["answers"]
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        for answer in answers:
            print(json.dumps(answer["response"]))
    return 0 if all(answer["status"] == "ok" for answer in answers) else 1


def _infer(arguments: argparse.Namespace) -> dict[str, Any]:
    from uuid_utils import uuid7

    from runtime.engine.oneshot import OneShotEngine
    from runtime.prepare.load import load_one_shot
    from runtime.prepare.store import PackageStore
    from runtime.probe import probe
    from traces.failures import ClassifiedError
    from traces.ledger.layout import default_ledger
    from traces.recorder import Recorder

    settings = _settings(arguments)
    ledger: Path = arguments.ledger or default_ledger()
    store, count = PackageStore(ledger), settings.instance_count
    models = [load_one_shot(store, arguments.package, threads=arguments.threads) for _ in range(count)]
    requests = [read_request(path, models[0].contract) for path in arguments.input]
    run_id = f"run_{uuid7().hex}"
    with Recorder(ledger, run_id=run_id, component="infer") as recorder:
        recorder.commit(
            "run.started",
            payload={"kind": "inference", "package": models[0].digest},
            track="B",
            input_ref=recorder.put_blob(probe(threads=arguments.threads).canonical()),
        )
        engine = OneShotEngine(
            [model.executor for model in models], settings, recorder=recorder, package=models[0].digest
        )
        try:
            futures = [engine.submit(one, request_ref=f"req_{uuid7().hex}") for one in requests]
            results = [future.result() for future in futures]
        except ClassifiedError as error:
            failure = {"failure_class": error.failure_class, "error_type": error.error_type}
            recorder.commit("run.completed", payload=error.to_payload(), track="B", status="error", **failure)
            raise
        finally:
            engine.close()
        good = all(result.status == "ok" for result in results)
        recorder.commit("run.completed", payload={}, track="B", status="ok" if good else "error")
    name = models[0].artifact.model
    return {"run": run_id, "package": models[0].digest, "answers": [_answer(name, result) for result in results]}


def _settings(arguments: argparse.Namespace) -> BatchingSettings:
    from runtime.engine.batching import BatchingSettings

    return BatchingSettings(
        max_batch_size=arguments.max_batch_size,
        preferred_batch_size=tuple(arguments.preferred_batch_size),
        max_queue_delay_microseconds=arguments.max_queue_delay_microseconds,
        preserve_ordering=arguments.preserve_ordering,
        max_queue_size=arguments.max_queue_size,
        instance_count=arguments.instance_count,
    )


def read_request(path: Path, contract: TensorContract) -> dict[str, Any]:
    """Read named arrays from KServe v2 JSON or an .npz; nothing in it is unpickled.  Raises RequestRefused."""
    import numpy as np

    from runtime.errors import RequestRefused

    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as found:
                return {name: found[name] for name in found.files}
        raw = json.loads(path.read_bytes())
        return {
            entry["name"]: np.array(entry["data"], dtype=DATATYPES[entry["datatype"]]).reshape(entry["shape"])
            for entry in raw["inputs"]
        }
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        wanted = ", ".join(f"{rule.name} {rule.dtype}{list(rule.shape)}" for rule in contract.inputs)
        raise RequestRefused(
            f"{path} holds no request: {type(error).__name__}: {error}",
            reason="bad_request",
            evidence={"failed_rule": "kserve v2 request"},
            fix=f"give KServe v2 JSON or an .npz with {wanted}",
        ) from error


def _answer(model: str, result: OneShotResult) -> dict[str, Any]:
    kinds = {kind: name for name, kind in DATATYPES.items()}
    outputs = [
        {"name": name, "shape": list(value.shape), "datatype": kinds[str(value.dtype)], "data": value.ravel().tolist()}
        for name, value in (result.outputs or {}).items()
    ]
    failure = {} if result.failure is None else {"error": result.failure.message}
    return {
        "response": {"model_name": model, "id": result.request_ref, "outputs": outputs, **failure},
        "status": result.status,
        "digests": result.output_digests(),
        "batch": result.batch,
        "batch_size": result.batch_size,
        "instance": result.instance,
        "queue_us": result.queue_us,
        "batch_us": result.batch_us,
        "compute_us": result.compute_us,
        "delivery_us": result.delivery_us,
        "total_us": result.total_us,
    }
