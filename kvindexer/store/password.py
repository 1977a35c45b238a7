"""A password that an operator keeps in a file, as Kubernetes mounts a secret."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvindexer.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

MAX_PASSWORD_BYTES: Final = 4096


def password_in(file: Path) -> str:
    """Read a password without its line's end; SettingsError if there is none."""
    key = "store_password_file"
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_PASSWORD_BYTES + 1)
        password = content.decode().rstrip("\r\n")
    except OSError as error:
        raise SettingsError(key, str(file), f"a readable file ({error.strerror})") from None
    except ValueError:
        raise SettingsError(key, str(file), "the path of a UTF-8 file") from None
    if not password or len(content) > MAX_PASSWORD_BYTES:
        raise SettingsError(key, str(file), f"a file with a password of at most {MAX_PASSWORD_BYTES} bytes")
    return password
