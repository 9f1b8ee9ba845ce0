"""Killed at random moments of recording, sealing, draining and compacting, nothing acknowledged is lost or doubled."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest


def trials(*arguments: str) -> dict[str, Any]:
    """Run crash trials in a process of their own: it forks, so it must hold no threads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.traces.crash_trials", "--json", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    document: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if document["ok"] else 1), done.stderr
    return document


def test_a_hundred_kills() -> None:
    outcome = trials("--trials", "100", "--seed", "7")
    assert outcome["ok"], outcome["details"]
    assert (outcome["trials"], outcome["lost"], outcome["doubled"]) == (100, 0, 0)
    assert outcome["acknowledged"] > 100


@pytest.mark.parametrize("broken", ["acknowledge-queued", "delete-first"])
def test_the_trials_catch_a_broken_build(broken: str) -> None:
    outcome = trials("--trials", "10", "--seed", "3", "--broken", broken)
    assert outcome["lost"] > 0


@pytest.mark.slow
def test_three_thousand_kills() -> None:
    assert trials("--trials", "3000", "--seed", "11")["ok"]
