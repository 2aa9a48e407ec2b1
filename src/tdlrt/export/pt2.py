"""Format `pt2`: the graph and its weights, written by torch.export; int8 by torchao (PT2E)."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator

import torch
from torch import nn
from torch.export import ExportedProgram

from tdlrt.errors import ExportError
from tdlrt.export.source import EXTRA, Source, quiet, trace
from tdlrt.extras import needs_extra

__all__ = ["METADATA", "dump", "load"]

METADATA = "metadata.json"


def dump(source: Source) -> bytes:
    """The content of a file for a network."""
    network = source.plain if source.calibration is None else _quantized(source)
    program = trace(network, source.example)
    _drop_source_locations(program)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(dict(source.metadata))})
    return _packed(file)


def load(data: bytes, model: nn.Module) -> nn.Module:
    """The network in a file's content. `model` is not used."""
    # This import registers the operators of an int8 graph; torchao is not needed for them.
    import torch.ao.quantization.fx._decomposed

    return torch.export.load(io.BytesIO(data)).module()


def _quantized(source: Source) -> nn.Module:
    """The graph in int8: weights per channel, activations by their range on calibration inputs.

    Raises:
        ExportError: torchao found nothing to quantise, which torchao itself does not report.
    """
    with needs_extra(EXTRA, "int8 in format 'pt2'"), quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    # torchao finds layers by metadata that before torch 2.12 only a strict trace contains.
    graph = trace(source.plain, source.example, strict=True).module()
    observed = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for batch in source.calibration_batches():
            observed(batch)
    quantized: torch.fx.GraphModule = convert_pt2e(observed)
    if not any("quantize" in str(node.target) for node in _nodes(quantized)):
        raise ExportError(
            f"calibration: torchao finds nothing in {type(source.plain).__name__} that it can "
            "quantise to int8; leave calibration out, or use format 'onnx'"
        )
    _drop_unused(quantized)
    return quantized


def _drop_unused(graph: torch.fx.GraphModule) -> None:
    """Delete the float weights, which torchao leaves in the graph next to the int8 weights."""
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in (*graph.named_parameters(), *graph.named_buffers()):
        if name not in used:
            parent, _, own = name.rpartition(".")
            delattr(graph.get_submodule(parent), own)


def _drop_source_locations(program: ExportedProgram) -> None:
    """Remove the example input, and the source file and line that each node comes from."""
    program.example_inputs = None
    for node in _nodes(program.graph_module):
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}


def _packed(file: io.BytesIO) -> bytes:
    """The archive with a compressed graph: uncompressed, it is larger than a small network."""
    packed = io.BytesIO()
    with zipfile.ZipFile(file) as before, zipfile.ZipFile(packed, "w") as after:
        for name in before.namelist():
            kind = zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
            after.writestr(name, before.read(name), kind)
    return packed.getvalue()


def _nodes(graph: nn.Module) -> Iterator[torch.fx.Node]:
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes
