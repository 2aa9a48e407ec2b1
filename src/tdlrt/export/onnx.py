"""Format `onnx`: written by torch.onnx; onnxruntime checks it and quantises it to int8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from tdlrt.export.source import EXTRA, Source, quiet, trace
from tdlrt.extras import needs_extra

__all__ = ["dump", "load"]

INPUT, OUTPUT, BATCH = "input", "output", "batch"


def dump(source: Source) -> bytes:
    """The content of a file for a network."""
    with needs_extra(EXTRA, "format 'onnx'"):
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    program = trace(source.plain, source.example)
    with quiet():
        exported: Any = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: BATCH},),  # names the axis; torch.export forgets its name
            verbose=False,
        )
    graph = exported.model_proto
    if source.calibration is not None:
        graph = _quantized(graph, source)
    _drop_source_locations(graph)
    for key, value in source.metadata.items():
        graph.metadata_props.add(key=key, value=value)
    data: bytes = graph.SerializeToString()
    return data


def load(data: bytes, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network in a file's content, run by onnxruntime on the CPU. `model` is not used."""
    with needs_extra(EXTRA, "running an ONNX file"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {INPUT: inputs.numpy()})[0])


def _quantized(graph: Any, source: Source) -> Any:
    """The graph in int8: weights per channel, activations by their range on calibration inputs."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = source.calibration_batches()

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    _untie(graph)
    with TemporaryDirectory() as folder:
        floats, prepared, integers = (Path(folder, f"{step}.onnx") for step in range(3))
        floats.write_bytes(graph.SerializeToString())
        quant_pre_process(floats, prepared)
        # onnxruntime quantises biases itself when it loads the file. Stored in int32, with scales
        # and zero points, they would take three times as many bytes.
        options = {"QuantizeBias": False}
        # reduce_range: weights in 7 bits. A CPU without VNNI adds pairs of products in 16 bits,
        # which would overflow with 8-bit weights.
        quantize_static(
            prepared,
            integers,
            Reader(),
            per_channel=True,
            reduce_range=True,
            extra_options=options,
        )
        return onnx.load(integers)


def _untie(graph: Any) -> None:
    """Give embeddings a table of their own where it is also the weight of another layer.

    onnxruntime would quantise the vectors that are looked up like the weight, with one scale per
    row of the table, which does not fit their shape.
    """
    lookups = [node for node in graph.graph.node if node.op_type == "Gather"]
    others = [node for node in graph.graph.node if node.op_type != "Gather"]
    shared = {node.input[0] for node in lookups} & {name for node in others for name in node.input}
    for weight in [one for one in graph.graph.initializer if one.name in shared]:
        table = graph.graph.initializer.add()
        table.CopyFrom(weight)
        table.name = f"{weight.name}.table"
        for node in lookups:
            if node.input[0] == weight.name:
                node.input[0] = table.name


def _drop_source_locations(graph: Any) -> None:
    """Remove inferred shapes, and the source file and line that each node comes from."""
    del graph.graph.value_info[:]
    for part in _parts(graph):
        del part.metadata_props[:]


def _parts(graph: Any) -> Iterator[Any]:
    own = graph.graph
    yield from (graph, own, *own.node, *own.initializer, *own.input, *own.output)
