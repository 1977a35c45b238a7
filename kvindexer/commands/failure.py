"""How a command says that it can't do what it was asked for."""

from __future__ import annotations

from kvindexer.errors import KvIndexerError


class CommandError(KvIndexerError):
    """Becomes one or two lines on stderr and the exit code: 1 it failed, 2 it was asked for wrongly."""

    def __init__(self, message: str, hint: str = "", *, exit_code: int = 1) -> None:
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
        super().__init__(f"{message}\n  {hint}" if hint else message)
