"""What is alike where a compiler runs in a child process?  One build, asked stage by stage, ended with the lowering."""

from __future__ import annotations

from runtime.backends.build_process import BuildProcess
from runtime.backends.errors import BackendRefused
from runtime.backends.lowering import ExportedLowering


class ChildLowering(ExportedLowering):
    """A lowering whose stages wait for one `BuildProcess`; a backend starts it."""

    _build: BuildProcess | None = None

    def close(self) -> None:
        """End the compiler if it still runs."""
        if self._build is not None:
            self._build.close()
        super().close()

    def _running(self) -> BuildProcess:
        if self._build is None:
            raise BackendRefused("the compiler has not been started", fix="call the stages in order")
        return self._build
