"""A captured program is named by what it computes, not by where its source lies."""

from __future__ import annotations

from pathlib import Path

import runtime
from runtime.backends.contract import Bounds
from runtime.backends.program import capture_program
from runtime.backends.protocol import BuildOptions
from runtime.models.random_checkpoint import random_checkpoint


def test_no_path_and_no_line_of_the_source_is_saved_with_a_program(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", num_layers=1, hidden_size=32, num_heads=2)
    options = BuildOptions(bounds=Bounds(max_batch=8, max_tokens=16, max_context=32))
    saved = capture_program(folder, options).serialized
    for text in (str(Path(runtime.__file__).parent), "decoder.py", "site-packages", str(tmp_path)):
        assert text.encode() not in saved
