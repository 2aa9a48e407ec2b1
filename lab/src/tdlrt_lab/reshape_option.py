"""The option `reshape` of a run: linear layers whose matrix is read as a tensor."""

from tdlrt.errors import RankError

__all__ = ["is_reshape", "parse_reshape"]

Sizes = tuple[int, ...]


def parse_reshape(text: str) -> dict[str, tuple[Sizes, Sizes]]:
    """The sizes of the modes of rows and columns by layer, as `tdlrt.factorize_` takes them.

    >>> parse_reshape("fc1=20x25:50x4x4,fc2=500:20x25")
    {'fc1': ((20, 25), (50, 4, 4)), 'fc2': ((500,), (20, 25))}

    Raises:
        RankError: A part has another form, or two have the same layer.
    """
    found: dict[str, tuple[Sizes, Sizes]] = {}
    for part in text.split(","):
        pattern, _, modes = (word.strip() for word in part.rpartition("="))
        sizes = [side.split("x") for side in modes.split(":")]
        numbers = all(size.isdecimal() for side in sizes for size in side)
        if not pattern or pattern in found or len(sizes) != 2 or not numbers:
            raise RankError(
                f"reshape {text!r}: got {part!r}, expected LAYER=ROWS:COLUMNS, each layer once, "
                "such as fc1=20x25:50x4x4"
            )
        rows, columns = (tuple(int(size) for size in side) for side in sizes)
        found[pattern] = rows, columns
    return found


def is_reshape(text: str) -> bool:
    """Whether `parse_reshape` reads a text."""
    try:
        parse_reshape(text)
    except RankError:
        return False
    return True
