"""Kinds of wrong files, in a fixed order: each field in turn, other encodings, other things.

`fuzz.py` draws changes at random; these are all of their kind, so a short test can go through them.
"""

import copy
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["CONTENTS", "PLACES", "changed", "fields"]

HOLE = 2**36
"""Bytes of a file that takes no disk: whoever reads it whole needs more memory than there is."""


def fields(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in nested dicts and lists, the containers themselves included."""
    if path:
        yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from fields(value, (*path, key))


def changed(tree: Any, path: tuple[Any, ...], *value: Any) -> Any:
    """A copy of a tree with another value at a path, or with none."""
    tree = copy.deepcopy(tree)
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    if value:
        holder[path[-1]] = value[0]
    else:
        del holder[path[-1]]
    return tree


CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "a blank": lambda content: b" ",
    "zeros": lambda content: bytes(len(content)),
    "cut": lambda content: content[: len(content) // 2],
    "one byte less": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "twice": lambda content: content * 2,
    "a mark before it": lambda content: b"\xef\xbb\xbf" + content,
    "utf-16": lambda content: content.decode("latin-1").encode("utf-16"),
    "utf-32": lambda content: content.decode("latin-1").encode("utf-32"),
    "other bytes": lambda content: content + b"\xff\xfe\xc3\x28",
    "half a surrogate pair": lambda content: content.replace(b"a", b"\xed\xa0\x80"),
    "an escaped half": lambda content: content.replace(b"a", rb"\ud800"),
    "an escaped NUL": lambda content: content.replace(b"a", rb"\u0000"),
    "other line ends": lambda content: content.replace(b"\n", b"\r\n"),
    "lists in lists": lambda content: b"[" * 200_000,
    "tables in tables": lambda content: b'{"a":' * 200_000,
    "many lists": lambda content: b"[" + b"[]," * 1_000_000 + b"[]]",
    "a long number": lambda content: b"9" * 1_000_000,
    "a long text": lambda content: b'"' + b"a" * 1_000_000 + b'"',
}
"""What may be written in a file's place, made from a right one."""


def _hole(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.truncate(HOLE)


def _listening(path: Path, content: bytes) -> None:
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as end:
        os.chdir(path.parent)  # names of sockets are short
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


def _linked(path: Path, content: bytes) -> None:
    target = path.with_name(f".{path.name}.target")
    target.write_bytes(content)
    path.symlink_to(target)


PLACES: dict[str, Callable[[Path, bytes], object]] = {
    "nothing": lambda path, content: None,
    "a folder": lambda path, content: path.mkdir(),
    "a pipe": lambda path, content: os.mkfifo(path),
    "a socket": _listening,
    "a device": lambda path, content: path.symlink_to("/dev/zero"),
    "a terminal": lambda path, content: path.symlink_to("/dev/tty"),
    "a link": _linked,
    "a link to nothing": lambda path, content: path.symlink_to(path.with_name("nothing")),
    "a link to itself": lambda path, content: path.symlink_to(path),
    "a hole": _hole,
}
"""What may stand in a file's place: puts it there, where nothing is."""
