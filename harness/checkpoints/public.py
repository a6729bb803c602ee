"""What of a run's command a public card tells: settings without the folders of whoever gave them.

The run's own record has the command whole.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

# One string of Hydra's: in quotes, or up to what ends it in a list or a mapping, behind its keys.
STRING = re.compile(
    r"""(?P<keys>(?:[^\s\[\]{},()'"/:=\\]+[:=]\s*)*)"""
    r"""(?P<text>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|"""
    r"""(?:\\.|[^\s\[\]{},()'"\\])(?:\\.|[^\[\]{},()\\])*)"""
)
STARTS = ("/", "~", "./", "../")
HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
# A path that shows by its beginning, in the midst of a text.
INSIDE = re.compile(r"""(?<![^\s'"(=:\\])(?:~\w*|\.\.?)?/(?!/)\S+""")


def public(command: str | None) -> str | None:
    """The command with the last part of each path alone; hub ids, where no folder is called so,
    stay whole."""
    if command is None:
        return None
    return shlex.join(map(_setting, shlex.split(command)))


def _setting(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals:
        key, value = "", word
    return f"{key}{equals}{STRING.sub(lambda found: found['keys'] + _string(found['text']), value)}"


def _string(text: str) -> str:
    quote = text[0] if text[0] in "'\"" and text[-1:] == text[0] else ""
    inner = text.strip(quote) if quote else text
    spaced = re.search(r"\s", inner.strip()) is not None
    a_path = inner.startswith(STARTS) or "/../" in inner or os.path.exists(inner)
    if spaced and not a_path:
        inner = INSIDE.sub(lambda found: Path(found[0]).name, inner)
    elif "/" in inner and (os.path.exists(inner) or not HUB.fullmatch(inner)):
        inner = Path(inner).name
    return f"{quote}{inner}{quote}"
