"""Models in safetensors files: `save` and `load`."""

from tdlrt.serialization.checkpoints import load, save

__all__ = ["load", "save"]
