"""`replaylab serve`: answer requests over HTTP on this machine, recording every stage."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

    import uvicorn

    from runtime.serve.deployment import Deployment

ISOLATION = ("none", "faulty", "all")  # as runtime.backends.hosted_process has it; importing that takes long

EPILOG = """\
example:
  replaylab serve --deployment desk --create PACKAGE
  replaylab serve --deployment desk --create PACKAGE --scheduling policy=priority --scheduling max_num_queued_reqs=64
  curl -s localhost:8321/v1/requests -H "Authorization: Bearer $KEY" -d '{"tenant": "aurora", "actor": "me",
       "task": {"kind": "support", "question": "How long is the warranty for tents?"}}'

The keys of a created deployment stand in DEPLOYMENT/keyring.json.

exit codes: 0 stopped, 2 refused or bad input, 3 failed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `replaylab serve`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default_ledger = os.environ.get("REPLAYLAB_LEDGER", "ledger")
    parser.add_argument(
        "--ledger", type=Path, default=Path(default_ledger), help="ledger folder (default: %(default)s)"
    )
    parser.add_argument("--deployment", type=Path, default=Path("deployment"), help="deployment folder")
    parser.add_argument(
        "--create", metavar="PACKAGE", nargs="+", help="create the support desk on these packages, in order of fallback"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the created desk's articles and accounts")
    parser.add_argument(
        "--scheduling",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="an engine setting of the created desk, as policy=fair; repeat for more",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8321, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        choices=range(1, 65),
        default=1,
        metavar="1..64",
        help="compute threads, a pin (default: 1)",
    )
    parser.add_argument(
        "--isolate",
        choices=ISOLATION,
        default="faulty",
        help="which packages run in a process of their own; faulty: whose backend can end it (default: %(default)s)",
    )
    parser.add_argument("--label", default="", help="a name for the run")
    parser.add_argument("--json", action="store_true", help="say what is served, or why not, as one JSON line")


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted; returns the exit code."""
    from manifests.errors import ManifestError
    from traces.failures import ClassifiedError, FailureClass

    try:
        return _serve(arguments)
    except ClassifiedError as error:
        _say(arguments, error.to_payload(), f"{error.message}\nFix: {error.fix or 'see the evidence with --json'}")
        refused = error.failure_class in (FailureClass.ARTIFACT_COMPATIBILITY, FailureClass.VALIDATION_POLICY)
        return 2 if refused else 3
    except ManifestError as error:
        _say(arguments, {"message": str(error), "fix": error.fix}, str(error))
        return 2
    except OSError as error:
        _say(arguments, {"message": str(error)}, f"Cannot listen on {arguments.host}:{arguments.port}: {error}")
        return 3


def _serve(arguments: argparse.Namespace) -> int:
    import asyncio
    import socket

    import uvicorn

    from manifests.errors import PinError
    from runtime.gateway.app import create_app
    from runtime.gateway.sessions import serving_session
    from runtime.serve.deployment import Deployment

    if arguments.scheduling and not arguments.create:
        raise PinError("a deployment has its own settings", where="--scheduling", fix="Leave it out, or give --create")
    deployment = _create(arguments) if arguments.create else Deployment.load(arguments.deployment)

    async def body(listener: socket.socket) -> None:
        session = serving_session(
            arguments.ledger,
            deployment,
            threads=arguments.threads,
            label=arguments.label,
            isolate=arguments.isolate,
        )
        async with session:  # opened here, so that a refusal is told in words and not as a server's traceback
            host, port = listener.getsockname()[:2]
            routes = {name: binding.artifact.package_digest for name, binding in session.routes.items()}
            document = {"url": f"http://{host}:{port}", "run": session.run_id, "routes": routes}
            shown = "\n".join(f"  {name}  {package}" for name, package in routes.items())
            _say(arguments, document, f"Serving on http://{host}:{port}  run {session.run_id}\n{shown}")
            app = create_app(lambda: contextlib.nullcontext(session))
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=10
            )
            await _serve_until_signalled(uvicorn.Server(config), listener)

    # listening first: a taken port is told before packages are loaded
    with socket.create_server((arguments.host, arguments.port)) as listener, contextlib.suppress(KeyboardInterrupt):
        asyncio.run(body(listener))
    return 0


async def _serve_until_signalled(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, and return, so that the session can record its end.

    uvicorn itself raises the signal again when it is done, which would end the process before that.
    """
    import asyncio
    import signal

    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, server.handle_exit, number, None)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    try:
        await server.serve(sockets=[listener])
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _create(arguments: argparse.Namespace) -> Deployment:
    from manifests.run import with_settings
    from manifests.scheduling import SchedulingManifest
    from runtime.prepare.load import check_scheduling
    from runtime.prepare.store import PackageStore
    from runtime.serve.deployment import create_support_desk

    scheduling = with_settings(SchedulingManifest(), arguments.scheduling, dimension="scheduling")
    store = PackageStore(arguments.ledger)
    names = ["primary", *(f"fallback-{place}" for place in range(1, len(arguments.create)))]
    packages = {name: store.resolve(package) for name, package in zip(names, arguments.create, strict=True)}
    check_scheduling(store, packages.values(), scheduling)
    return create_support_desk(arguments.deployment, seed=arguments.seed, packages=packages, scheduling=scheduling)


def _say(arguments: argparse.Namespace, document: Mapping[str, object], text: str) -> None:
    if arguments.json:
        print(json.dumps(document), flush=True)
    else:
        print(text, file=sys.stderr, flush=True)
