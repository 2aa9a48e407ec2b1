"""What the commands without data and training start from."""

from typing import Any, NamedTuple

from torch import nn

from tdlrt_lab.data import DATA_SETS, DatasetInfo
from tdlrt_lab.models import build_model
from tdlrt_lab.names import pick
from tdlrt_lab.rank_option import check_rank, parse_rank

__all__ = ["Untrained", "untrained"]


class Untrained(NamedTuple):
    """A dense network as it is before training, and what the options say about it."""

    info: DatasetInfo
    network: nn.Module
    ranks: Any
    batch_size: int


def untrained(model: str, data: str, rank: str, batch_size: int | None) -> Untrained:
    """Build a network for the images of a data set, which is not read.

    Args:
        model: Name of the network.
        data: Name of the data set.
        rank: As written on the command line.
        batch_size: None takes the data set's own.

    Raises:
        UnknownNameError: There is no such model or data set.
        RankError: The rank is not one.
    """
    info = pick("data set", data, DATA_SETS)
    network = build_model(model, info.image_shape, info.classes)
    return Untrained(info, network, check_rank(parse_rank(rank)), batch_size or info.batch_size)
