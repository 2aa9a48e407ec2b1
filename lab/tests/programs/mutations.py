"""Inputs that are nearly right: bytes and trees of values with something in them changed."""

import copy
import math
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

NUMBER = re.compile(rb"-?\d+\.?\d*")

ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320)
ODD_VALUES = (
    *ODD_NUMBERS,
    math.nan,
    math.inf,
    -math.inf,
    None,
    True,
    "",
    "a",
    "\0",
    "../../outside",
    "/outside",
    "a" * 5000,
    "\u202e",
    [],
    {},
    [[]],
    [1, "a", None],
    {"a": {"a": {}}},
)
ODD_TEXTS = tuple(
    text.encode()
    for text in (
        *map(str, ODD_NUMBERS),
        *("nan", ".nan", "-.inf", "1e999", "null", "true", "''", '"\\u0000"', "0x" + "f" * 400),
        *("../../outside", "/outside", "[", "{", "]", "}", "[" * 2000, "9" * 5000, "&a [*a]", "*a"),
        *("!!python/object/apply:os.getcwd []", "<<: *a", "2001-99-99", "\t", "---\n", "? [a]"),
    )
)


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def mutate_bytes(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Bits flipped, parts replaced, cut out, doubled, cut off or taken from another file."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        # Headers and footers are where files say what they are.
        place = rng.choice((rng.randrange(len(data) + 1), _near_end(len(data), rng)))
        width = rng.choice((1, 1, 2, 4, 8, 64, 1024))
        match rng.randrange(9):
            case 0 | 1 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 2:
                data[place : place + width] = rng.randbytes(width)
            case 3:
                data[place : place + width] = bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * width
            case 4:
                del data[place : place + width]
            case 5:
                data[place:place] = data[place : place + width] * rng.choice((1, 1, 8))
            case 6:
                del data[place:]
            case 7:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                data[place : place + width] = other[start : start + rng.choice((width, 10**9))]
            case 8:
                numbers = list(NUMBER.finditer(data, max(0, place - 500), place + 500))
                where = rng.choice(numbers).span() if numbers else (place, place)
                data[slice(*where)] = rng.choice(ODD_TEXTS)
    return bytes(data)


def mutate_tree(tree: Any, rng: random.Random, odd: Sequence[Any] = ODD_VALUES) -> Any:
    """A copy of nested dicts and lists with values replaced, removed, doubled, moved or renamed."""
    root = [copy.deepcopy(tree)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = rng.choice(list(_places(root)))
        match rng.randrange(6):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(rng.choice(odd))
            case 3 if holder is not root:
                del holder[key]
            case 4:
                other, name = rng.choice(list(_places(root)))
                holder[key] = copy.deepcopy(other[name])
            case 5 if isinstance(holder, dict):
                holder[rng.choice(("", "a", "../outside", "\0", "a" * 300))] = holder.pop(key)
            case _ if isinstance(holder, list) and holder is not root:
                holder.append(copy.deepcopy(holder[key]))
    return root[0]


def _places(root: list[Any]) -> Iterator[tuple[Any, Any]]:
    waiting: list[Any] = [root]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


def _near_end(length: int, rng: random.Random) -> int:
    distance = min(length, int(rng.expovariate(1 / 64)))
    return rng.choice((distance, length - distance))
