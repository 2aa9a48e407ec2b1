"""The data of the runs: a catalogue of data sets, and their images in memory."""

from tdlrt_lab.data.catalogue import DATA_SETS, DatasetInfo
from tdlrt_lab.data.loading import DataProgress, ImageData, ImageRecord, hold_out, load_data

__all__ = [
    "DATA_SETS",
    "DataProgress",
    "DatasetInfo",
    "ImageData",
    "ImageRecord",
    "hold_out",
    "load_data",
]
