"""The untrained network of the commands that neither read data nor train."""

from typing import Any, NamedTuple

from torch import nn

from tdlrt_lab.data import DATA_SETS, DatasetInfo
from tdlrt_lab.models import build_model
from tdlrt_lab.names import pick
from tdlrt_lab.rank_option import check_rank, parse_rank

__all__ = ["Untrained", "untrained"]


class Untrained(NamedTuple):
    """An untrained dense network with its data set, initial ranks and batch size."""

    info: DatasetInfo
    network: nn.Module
    ranks: Any
    batch_size: int


def untrained(model: str, data: str, rank: str, batch_size: int | None) -> Untrained:
    """Build a network for the images of a data set, without reading the data.

    Args:
        model: Name of the network.
        data: Name of the data set.
        rank: Initial ranks, as on the command line.
        batch_size: Batch size; None takes the default of the data set.

    Raises:
        UnknownNameError: The model or the data set is unknown.
        RankError: The rank has another form or is out of range.
    """
    info = pick("data set", data, DATA_SETS)
    network = build_model(model, info.input_shape, info.classes)
    return Untrained(info, network, check_rank(parse_rank(rank)), batch_size or info.batch_size)
