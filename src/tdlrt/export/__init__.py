"""Export of trained networks to files that run without this library."""

from tdlrt.export.plain_files import load_plain
from tdlrt.export.writing import FORMATS, ExportReport, export, load_network

__all__ = ["FORMATS", "ExportReport", "export", "load_network", "load_plain"]
