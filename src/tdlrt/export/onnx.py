"""Format `onnx`: by torch.onnx, checked with onnxruntime, which also makes the int8 network."""

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

INPUT, OUTPUT = "input", "output"


def dump(source: Source) -> bytes:
    """The file of a network."""
    with needs_extra(EXTRA, "format 'onnx'"):
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    program = trace(source.plain, source.example)
    with quiet():
        exported: Any = torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
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
    """The network in the bytes of a file, run by onnxruntime on the CPU; it needs no model."""
    with needs_extra(EXTRA, "running an ONNX file"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {INPUT: inputs.numpy()})[0])


def _quantized(graph: Any, source: Source) -> Any:
    """The graph in int8: weights per channel, activations by their range in the calibration."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = source.calibration_batches()

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    with TemporaryDirectory() as folder:
        floats, prepared, integers = (Path(folder, f"{step}.onnx") for step in range(3))
        floats.write_bytes(graph.SerializeToString())
        quant_pre_process(floats, prepared)
        # onnxruntime rounds biases itself when it loads the file; stored in int32 they would bring
        # scales and zero points along and take three times the bytes.
        options = {"QuantizeBias": False}
        # In 7 bits: where a CPU has no VNNI, pairs of products are added in 16 bits, which those of
        # 8-bit weights overflow.
        quantize_static(
            prepared,
            integers,
            Reader(),
            per_channel=True,
            reduce_range=True,
            extra_options=options,
        )
        return onnx.load(integers)


def _drop_source_locations(graph: Any) -> None:
    """Leave out shapes that follow from others and where in which source file a node comes from."""
    del graph.graph.value_info[:]
    for part in _parts(graph):
        del part.metadata_props[:]


def _parts(graph: Any) -> Iterator[Any]:
    own = graph.graph
    yield from (graph, own, *own.node, *own.initializer, *own.input, *own.output)
