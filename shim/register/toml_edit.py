"""TOML text edited with everything else in the file kept as it is: comments, order, spacing, line ends.

There are two edits, each easy to take back: a marked block of tables at the end of the file, and one marked assignment.
Every edit is proved: the result is parsed again and must mean exactly the old document plus the addition, else it is
refused with the lines to add by hand (a parent that is an inline table or is written with dotted keys cannot be extended).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from smr.proto.errors import Code, SmrError

BEGIN = "# >>> smr: written by SMR's install.sh, which also takes it away; changes between these lines are lost"
END = "# <<< smr"
_BLOCK = re.compile(rf"\n?{re.escape(BEGIN)}\n.*?{re.escape(END)}\n", re.DOTALL)
_ADDED = "# smr: added by install.sh"
_ADDED_LINE = re.compile(rf"^.*{re.escape(_ADDED)}\r?\n", re.MULTILINE)
_REPLACED = "# smr: install.sh replaced "
_REPLACED_LINE = re.compile(rf"^([ \t]*).*{re.escape(_REPLACED)}", re.MULTILINE)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

Table = dict[str, object]


def parse(text: str, path: Path) -> Table:
    """The document. Raises CONFIG_INVALID naming the file."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SmrError(f"{path} is not valid TOML: {error}", hint=f"correct {path}", code=Code.CONFIG_INVALID) from error


def strip(text: str) -> str:
    """The text as it was before our edits, with what others changed since."""
    return _REPLACED_LINE.sub(r"\1", _ADDED_LINE.sub("", _BLOCK.sub("", text)))


def add_tables(text: str, addition: Table, path: Path) -> str:
    """`text` with the tables of `addition` in a marked block at its end."""
    block = f"{BEGIN}\n{render(addition)}{END}\n"
    # strip() takes this line break away again; a file that ends without one gets it back that way too
    return _proved(text, f"{text}\n{block}" if text else block, addition, path)


def set_value(text: str, table: Sequence[str], key: str, value: str, path: Path) -> str:
    """`text` with `key = value` in `table`, which has a header: its line replaced, or one added after the header."""
    assignment = f"{key} = {_value(value)}"
    addition = nest(table, {key: value})
    lines = text.splitlines(keepends=True)
    header = _header_line(lines, table)
    if header is None:
        raise ValueError(table)
    for number in range(header + 1, len(lines)):
        if _header(lines[number]) is not None:
            break
        if match := re.match(rf"([ \t]*)({re.escape(key)}[ \t]*=.*)", lines[number], re.DOTALL):
            lines[number] = f"{match[1]}{assignment}  {_REPLACED}{match[2]}"
            return _proved(text, "".join(lines), addition, path)
    indent = lines[header][: len(lines[header]) - len(lines[header].lstrip())]
    lines.insert(header + 1, f"{indent}{assignment}  {_ADDED}\n")
    return _proved(text, "".join(lines), addition, path)


def has_header(text: str, table: Sequence[str]) -> bool:
    """Whether `table` has a [header] of its own, so that it cannot get a second one."""
    return _header_line(text.splitlines(), table) is not None


def nest(keys: Sequence[str], table: Table) -> Table:
    """`table` under the path `keys`."""
    for key in reversed(keys):
        table = {key: table}
    return table


def at(document: Mapping[str, object], *keys: str) -> Table:
    """The table at `keys`; empty where there is none."""
    found: object = document
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return dict(cast(Mapping[str, object], found)) if isinstance(found, Mapping) else {}


def merge(old: Mapping[str, object], new: Mapping[str, object]) -> Table:
    """`old` with `new` over it, tables merged, everything else replaced."""
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(cast(Table, before), cast(Table, value)) if both else value
    return merged


def render(document: Mapping[str, object], keys: Sequence[str] = ()) -> str:
    """TOML of a document of strings, numbers, booleans, arrays and tables. Raises CONFIG_INVALID for anything else."""
    plain = {key: value for key, value in document.items() if not isinstance(value, Mapping)}
    text = ""
    if plain or (keys and not document):
        if keys:
            text += f"[{'.'.join(map(_key, keys))}]\n"
        text += "".join(f"{_key(key)} = {_value(value)}\n" for key, value in plain.items())
    for key, value in document.items():
        if isinstance(value, Mapping):
            text += render(cast(Table, value), [*keys, key])
    return text


def _proved(before: str, after: str, addition: Table, path: Path) -> str:
    """`after` when it means `before` plus `addition` and can be taken back; refuses otherwise."""
    try:
        right = tomllib.loads(after) == merge(parse(before, path), addition) and strip(after) == strip(before)
    except tomllib.TOMLDecodeError:
        right = False
    if not right:
        raise SmrError(
            f"cannot add to {path}: a table that is written inline or with dotted keys cannot be extended",
            hint=f"write it as a [table], or add by hand: {render(addition).strip().replace(chr(10), '; ')}",
            code=Code.CONFIG_INVALID,
        )
    return after


def _header_line(lines: Sequence[str], table: Sequence[str]) -> int | None:
    return next((number for number, line in enumerate(lines) if _header(line) == list(table)), None)


def _header(line: str) -> list[str] | None:
    """Keys of a `[table]` line, [] of any other line that begins a table; None for what is none."""
    if not line.lstrip().startswith("["):
        return None
    try:
        document: object = tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return None
    keys: list[str] = []
    while isinstance(document, dict) and document:
        key, document = next(iter(document.items()))
        keys.append(key)
    return keys if isinstance(document, dict) else []


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _value(key)


def _value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return f"[{', '.join(map(_value, value))}]"
        case _:
            raise SmrError(f"cannot write {value!r} as TOML", code=Code.CONFIG_INVALID)
