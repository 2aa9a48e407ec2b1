"""Data sets: a catalogue of them, and their images in memory."""

from tdlrt_lab.data.catalogue import DATA_SETS, DatasetInfo
from tdlrt_lab.data.image_data import ImageData, ImageRecord, hold_out
from tdlrt_lab.data.loading import DataProgress, load_data

__all__ = [
    "DATA_SETS",
    "DataProgress",
    "DatasetInfo",
    "ImageData",
    "ImageRecord",
    "hold_out",
    "load_data",
]
