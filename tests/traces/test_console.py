"""What is printed where no terminal says how wide it is has the width of COLUMNS, or else a fixed one."""

from __future__ import annotations

import pytest

from traces.console import output_console


@pytest.mark.parametrize(("columns", "width"), [(None, 110), ("72", 72), ("300", 300), ("0", 110), ("wide", 110)])
def test_the_width_of_what_is_piped(columns: str | None, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert output_console(110).width == width
