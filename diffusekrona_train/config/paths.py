"""Paths as people write them: `$HOME`, `%USERPROFILE%`, `~`, and what YAML makes of a Windows path in double quotes."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

_VARIABLE = re.compile(r"\$\{(\w+)\}|\$([A-Za-z_]\w*)|%([A-Za-z_][\w()]*)%")
_NAMES = {"\t": r"a tab (\t)", "\n": r"a line end (\n)", "\r": r"a line end (\r)", "\b": r"a backspace (\b)"}


def user_path(text: str, field: str) -> str:
    """Return the path with its environment variables filled in; hub names and aliases pass as they are.

    ValueError of one line where it holds a control character, an unknown variable or an unknown user's `~`. What lies
    on the disk under the very name, dollar signs and all, is left as it is.
    """
    control = next((character for character in text if _is_control(character)), None)
    if control is not None:
        raise ValueError(
            f"{field}: {_short(text)} holds {_NAMES.get(control, f'the control character {control!r}')}; in double "
            "quotes a backslash begins an escape: use single quotes or forward slashes"
        )
    if _VARIABLE.search(text) and not _is_there(text):
        text = _VARIABLE.sub(lambda match: _value(match, text, field), text)
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            raise ValueError(f"{field}: {_short(text)}: no such user; write the full path") from None
    return text


def _value(match: re.Match[str], text: str, field: str) -> str:
    name = match[1] or match[2] or match[3]
    value = os.environ.get(name, "")
    if not value:
        raise ValueError(f"{field}: {_short(text)} holds {match[0]}, which is not set here; write the path out")
    return value


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Zl", "Zp")


def _is_there(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:79] + "…")
