"""How are the pages opened?  ``replaylab dashboard`` starts them on this machine only and prints their address."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

EXAMPLE = """\
example:
  replaylab dashboard --ledger ledger
  replaylab dashboard --ledger demo/ledger --port 8600

The pages only read. Stop them with Ctrl-C.
exit codes: 0 stopped by you, 2 refused (bad port, port in use), 3 the pages did not start
"""
ADDRESS = "127.0.0.1"
FIRST_PORT = 8501
PORTS_TRIED = 20
START_LIMIT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.epilog = EXAMPLE
    parser.add_argument("--ledger", type=Path, help="the ledger's folder (default: REPLAYLAB_LEDGER or ./ledger)")
    parser.add_argument("--port", type=int, help=f"port on {ADDRESS} (default: the first free one from {FIRST_PORT})")
    parser.add_argument("--json", action="store_true", help="print the address as one line of JSON")


def run(arguments: argparse.Namespace) -> int:
    """Start the pages, print where they are, and stay until they are stopped."""
    from traces.ledger.layout import default_ledger

    ledger = Path(arguments.ledger or default_ledger()).absolute()
    if ledger.exists() and not ledger.is_dir():
        return _refuse(f"{ledger} is a file, not a ledger", "Give the ledger's folder with --ledger.")
    port = arguments.port if arguments.port is not None else free_port()
    if port is None or not 1 <= port <= 65_535:
        return _refuse(f"{arguments.port} is no port", "Give a number from 1 to 65535 with --port.")
    if not is_free(port):
        return _refuse(f"port {port} on {ADDRESS} is in use", "Give another one with --port, or leave it out.")
    signal.signal(signal.SIGTERM, _stop)  # the pages are a process of their own and must not outlive this one
    pages = subprocess.Popen(command(port), env=environment(ledger), stdout=subprocess.DEVNULL)
    try:
        if not _answers(port, pages):
            print("error: the pages did not start; Streamlit says why above", file=sys.stderr)
            return 3
        _announce(port, ledger, as_json=arguments.json)
        return 0 if pages.wait() in (0, 130, -2) else 3
    except KeyboardInterrupt:
        return 0
    finally:
        pages.terminate()
        pages.wait()


def command(port: int) -> list[str]:
    """Return the command line that serves the pages: this machine only, nothing sent anywhere, the house's theme."""
    from dashboards.theme import STREAMLIT_OPTIONS

    options: Mapping[str, str] = {
        "server.address": ADDRESS,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",
        "client.showErrorDetails": "none",
        "logger.level": "error",
        **STREAMLIT_OPTIONS,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "streamlit", "run", str(Path(__file__).with_name("app.py")), *words]


def environment(ledger: Path) -> dict[str, str]:
    """Return this process's environment with the ledger named in it."""
    return {**os.environ, "REPLAYLAB_LEDGER": str(ledger)}


def free_port() -> int | None:
    """Return the first free port from the usual one on; None when none of twenty is free."""
    return next((port for port in range(FIRST_PORT, FIRST_PORT + PORTS_TRIED) if is_free(port)), None)


def is_free(port: int) -> bool:
    """Say whether nobody listens on a port of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError:
            return False
    return True


def _answers(port: int, pages: subprocess.Popen[bytes]) -> bool:
    """Wait until the pages accept a connection; false when they end or take too long."""
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until and pages.poll() is None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            if probe.connect_ex((ADDRESS, port)) == 0:
                return True
        time.sleep(0.1)
    return False


def _announce(port: int, ledger: Path, *, as_json: bool) -> None:
    """Print where the pages are."""
    url = f"http://{ADDRESS}:{port}"
    if as_json:
        print(json.dumps({"url": url, "ledger": str(ledger)}), flush=True)
        return
    print(f"Replaylab pages over {ledger}\n\n    {url}\n\nCtrl-C stops them.", flush=True)


def _stop(number: int, frame: object) -> None:
    """Turn a request to end into the same as Ctrl-C."""
    raise KeyboardInterrupt


def _refuse(what: str, fix: str) -> int:
    """Say what is wrong and what to do."""
    print(f"error: {what}. {fix}", file=sys.stderr)
    return 2
