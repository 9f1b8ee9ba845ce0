"""Who built this package, from what, and how?  SLSA provenance (v1) in an in-toto statement (v1), as plain JSON.

Fields as in https://slsa.dev/spec/v1.0/provenance and https://in-toto.io/Statement/v1.  No times and no invocation id:
a rebuild gives the same statement; when it was built stands in the events of the preparation.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from manifests.preparation import StageManifest

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:replaylab:prepare:1"


def provenance(
    *,
    package: str,
    files: Mapping[str, str],
    backend: str,
    options: Mapping[str, Any],
    model: str,
    libraries: Mapping[str, str],
    stages: Sequence[StageManifest],
    reproducible: Mapping[str, Any],
) -> dict[str, Any]:
    """Make the statement.

    Args:
        package: digest of the package, which is what the statement is about.
        files: digest of each of its files, by name.
        backend: which backend built it.
        options: what was asked for, as the package manifest has them.
        model: digest of the source model.
        libraries: versions of what took part.
        stages: the stages so far; each emitted digest is a by-product.
        reproducible: what `reproducible_build` says.
    """
    version = importlib.metadata.version("replaylab")
    return {
        "_type": STATEMENT,
        "subject": [_named("package", package), *(_named(name, digest) for name, digest in sorted(files.items()))],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"backend": backend, "options": dict(options)},
                "internalParameters": {"reproducible_build": dict(reproducible)},
                "resolvedDependencies": [
                    _named("model", model),
                    *({"uri": f"pkg:pypi/{name}@{found}"} for name, found in sorted(libraries.items())),
                ],
            },
            "runDetails": {
                "builder": {"id": "urn:replaylab:builder", "version": {"replaylab": version}},
                "byproducts": [_named(f"{one.stage} {one.name}", one.output_digest) for one in stages],
            },
        },
    }


def reproducible_of(statement: Mapping[str, Any]) -> dict[str, Any]:
    """Read back whether the build repeats; empty where the statement does not say."""
    definition = statement.get("predicate", {}).get("buildDefinition", {})
    return dict(definition.get("internalParameters", {}).get("reproducible_build", {}))


def _named(name: str, digest: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}}
