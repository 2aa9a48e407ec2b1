"""Data sets: a catalogue of them, and their images or text in memory."""

from tdlrt_lab.data.catalogue import DATA_SETS, DatasetInfo
from tdlrt_lab.data.image_data import ImageData
from tdlrt_lab.data.loading import DataProgress, load_data
from tdlrt_lab.data.protocol import Data, DataRecord
from tdlrt_lab.data.text_data import TextData

__all__ = [
    "DATA_SETS",
    "Data",
    "DataProgress",
    "DataRecord",
    "DatasetInfo",
    "ImageData",
    "TextData",
    "load_data",
]
