"""Fixtures of the request path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.serve.deployment import Deployment, create_support_desk
from tests.runtime.serve.desk import PACKAGES, SEED, Desk


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    """Return a fresh support desk."""
    return create_support_desk(tmp_path / "desk", seed=SEED, packages=PACKAGES)


@pytest.fixture
def desk(deployment: Deployment) -> Iterator[Desk]:
    """Return a desk with a perfect scripted model."""
    desk = Desk(deployment)
    yield desk
    desk.stores.close()
