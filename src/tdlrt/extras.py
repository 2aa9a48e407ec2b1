"""Imports of optional packages, with an error that says how to install a missing one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tdlrt.errors import MissingExtraError

__all__ = ["needs_extra"]


@contextmanager
def needs_extra(extra: str, purpose: str, distribution: str = "tdlrt") -> Iterator[None]:
    """Turn a failed import inside the `with` block into an error that names the extra to install.

    Args:
        extra: Name of the extra that installs the packages.
        purpose: What needs the packages: the subject of the error message.
        distribution: The distribution that has the extra.

    Raises:
        MissingExtraError: One of the packages is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise MissingExtraError(
            f"{purpose} needs the package {package}, which is not installed; "
            f"run: pip install '{distribution}[{extra}]'"
        ) from error
