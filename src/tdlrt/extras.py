"""Optional packages: a missing one is an error that says how to install it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tdlrt.errors import MissingExtraError

__all__ = ["needs_extra"]


@contextmanager
def needs_extra(extra: str, purpose: str, distribution: str = "tdlrt") -> Iterator[None]:
    """Import optional packages inside.

    Args:
        extra: Name of the extra that brings them.
        purpose: What needs them, as the subject of the message.
        distribution: The package that has the extra.

    Raises:
        MissingExtraError: One of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise MissingExtraError(
            f"{purpose} needs the package {package}, which is not installed; "
            f"run: pip install '{distribution}[{extra}]'"
        ) from error
