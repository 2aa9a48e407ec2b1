"""Arguments of `TDLRT`: checked, and made what the rest works with."""

from __future__ import annotations

from collections.abc import Mapping

from tdlrt.errors import RankError
from tdlrt.ranks import DEFAULT_TAU, ByName, RankPolicy, RelativeTolerance

__all__ = ["check_count", "check_options", "resolve_policy"]


def check_options(
    *,
    integrator: str,
    capturable: bool,
    adapt_every: int | None,
    core_steps: int,
    basis_every: int,
    freeze_after: int | None,
    skip_nonfinite: int,
) -> None:
    """Refuse options of `TDLRT` that are out of range, or that exclude each other.

    Raises:
        ValueError: One is.
    """
    if integrator not in ("parallel", "bug"):
        raise ValueError(f"integrator: got {integrator!r}, expected 'parallel' or 'bug'")
    for name, count in (("adapt_every", adapt_every), ("freeze_after", freeze_after)):
        if count is not None:
            check_count(name, count)
    check_count("core_steps", core_steps)
    check_count("basis_every", basis_every)
    check_count("skip_nonfinite", skip_nonfinite, least=0)
    if basis_every > 1 and (integrator == "bug" or capturable):
        other = "integrator='bug'" if integrator == "bug" else "capturable=True"
        raise ValueError(f"basis_every: got {basis_every} with {other}, expected 1 there")


def resolve_policy(
    tau: float | None, rank_policy: RankPolicy | Mapping[str, RankPolicy] | None
) -> RankPolicy:
    """The policy that `tau` and `rank_policy` stand for.

    Raises:
        RankError: Both are given, or rank_policy is of another type.
    """
    if rank_policy is None:
        return RelativeTolerance(DEFAULT_TAU if tau is None else tau)
    if tau is not None:
        raise RankError(f"tau: got {tau} and rank_policy={rank_policy}; give one of them")
    if isinstance(rank_policy, Mapping):
        return ByName(rank_policy)
    if not isinstance(rank_policy, RankPolicy):
        raise RankError(
            f"rank_policy: got {rank_policy!r}, expected RelativeTolerance(...), "
            "ParameterBudget(...), FixedRank(), or a dict from layer-name pattern to these"
        )
    return rank_policy


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Refuse what is no int, or too small.

    Raises:
        ValueError: It is.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected an int of at least {least}")
