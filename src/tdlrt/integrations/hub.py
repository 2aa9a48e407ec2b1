"""Hugging Face Hub: save_pretrained, from_pretrained and a model card for networks of any ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from tdlrt.errors import CheckpointError
from tdlrt.extras import needs_extra
from tdlrt.files import read_text, write_atomically
from tdlrt.nn.calls import Inputs, call_model, zeros_for
from tdlrt.report import summary
from tdlrt.serialization import load, save
from tdlrt.surgery import to_dense, to_plain
from tdlrt.text_tables import format_shape

with needs_extra("hf", "tdlrt.integrations.hub"):
    from huggingface_hub import ModelCard, PyTorchModelHubMixin

__all__ = ["Latency", "TuckerHubMixin", "measure_latency"]

CARD = """---
{{ card_data }}
---

# {{ name }}

<!-- tdlrt: save_pretrained writes from here to the end of tdlrt anew -->
{% if size.ranks -%}
Trained in Tucker format by [TDLRT]({{ paper_url }}). Compression:
{{ "%.1f" | format(100 * size.compression) }} % of the weights in Tucker format,
{{ "%.1f" | format(100 * size.network_compression) }} % of all parameters.
{%- else -%}
No layer is in Tucker format.
{%- endif %}

| | this network | dense |
| --- | --- | --- |
| parameters | {{ "{:,}".format(size.network_parameters) }} | {{
"{:,}".format(size.network_dense_parameters) }} |
{%- if accuracy is not none or dense_accuracy is not none %}
| accuracy (%) | {{ accuracy if accuracy is not none }} | {{
dense_accuracy if dense_accuracy is not none }} |
{%- endif %}
{%- if latency is not none %}
| latency (ms) | {{ "%.3f" | format(latency.milliseconds) }} | {{
"%.3f" | format(latency.dense_milliseconds) }} |

Latency is the median time of a forward pass as plain torch layers on an input of
{{ shape(latency.input_size) }} ({{ latency.conditions }}).
{%- endif %}

| layer | weight | ranks | parameters | dense |
| --- | --- | --- | --- | --- |
{%- for row in size.rows %}
| {{ row.name }} | {{ shape(row.shape) }} | {{ shape(row.ranks) if row.ranks else "-" }} | {{
"{:,}".format(row.parameters) }} | {{ "{:,}".format(row.dense_parameters) }} |
{%- endfor %}

<!-- end of tdlrt -->

With the class `{{ name }}` at hand, `{{ name }}.from_pretrained(...)` restores the network, ranks
included. Needs `tdlrt`.
"""

_BLOCK = re.compile(r"<!-- tdlrt: .*<!-- end of tdlrt -->", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The time of a forward pass, as plain torch layers and dense.

    Attributes:
        milliseconds: Median time of the network that `to_plain` makes.
        dense_milliseconds: Median time of the dense network.
        input_size: Shape of the first input with the batch.
        conditions: Device, threads and version of torch of the measurement, in words.
    """

    milliseconds: float
    dense_milliseconds: float
    input_size: tuple[int, ...]
    conditions: str


def measure_latency(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    seconds: float = 1.0,
    *,
    example_inputs: Inputs | None = None,
) -> Latency:
    """Time forward passes of a model in evaluation mode, as plain torch layers and dense.

    Args:
        model: A model with Tucker layers or without; not changed.
        input_size: Shape of the input with the batch, such as (1, 3, 32, 32).
        seconds: Duration of the measurement of each network.
        example_inputs: Instead of input_size, what the model is called with: a tensor, a tuple of
            all inputs, or a dict of keyword arguments.

    Raises:
        TypeError: input_size is not a sequence of ints, or example_inputs has another type.
        ValueError: Both or none of the two are given, or the model does not take them.
    """
    if input_size is None and example_inputs is None:
        raise ValueError("input_size: got None, expected the shape of an input, or example_inputs")
    plain = to_plain(model, input_size=input_size, example_inputs=example_inputs)
    if input_size is not None:
        example_inputs = zeros_for(model, input_size)
    tensors = _tensors_of(example_inputs)
    threads = torch.get_num_threads()
    times = []
    for network in (plain, to_dense(model)):
        timer = Timer(
            "call_model(network, inputs)",
            globals={
                "call_model": call_model,
                "network": network.eval(),
                "inputs": example_inputs,
            },
            num_threads=threads,
        )
        with torch.inference_mode():
            times.append(1e3 * timer.blocked_autorange(min_run_time=seconds).median)
    device = tensors[0].device if tensors else torch.device("cpu")
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Latency(
        milliseconds=times[0],
        dense_milliseconds=times[1],
        input_size=tuple(tensors[0].shape) if tensors else (),
        conditions=f"{name}, threads: {threads}, torch {torch.__version__}",
    )


def _tensors_of(inputs: Inputs | None) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs or ()
    return [one for one in values if isinstance(one, Tensor)]


class TuckerHubMixin(
    PyTorchModelHubMixin,
    library_name="tdlrt",
    tags=["tucker", "low-rank"],
    paper_url="https://arxiv.org/abs/2305.19059",
    model_card_template=CARD,
):
    """Second base class of a network, for the Hugging Face Hub and for folders in its layout.

    `save_pretrained(folder)` writes the arguments of `__init__`, the weights with their ranks
    (`tdlrt.save`) and a model card. `from_pretrained(folder or repository)` constructs the network
    with these arguments, loads weights and ranks (`tdlrt.load`) and sets evaluation mode.
    No pickle is written or read.
    """

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        model_card_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> str | None:
        """Write the network to a folder, and to the Hub if asked to.

        In an existing README.md only the part about ranks and sizes is replaced.

        Args:
            save_directory: The folder; made if it does not exist.
            model_card_kwargs: Arguments of `generate_model_card`.
            options: See `huggingface_hub.PyTorchModelHubMixin`.

        Raises:
            CheckpointError: The state cannot be stored, or the README.md that is there cannot be
                read.
        """
        path, given = Path(save_directory) / "README.md", model_card_kwargs or {}
        old = _text(path) if path.exists() else ""
        url = super().save_pretrained(save_directory, model_card_kwargs=given, **options)
        new = _BLOCK.search(str(self.generate_model_card(**given)))
        if new and _BLOCK.search(old):
            text = _BLOCK.sub(lambda _: new[0], old)
            write_atomically(path, lambda file: file.write(text.encode()))
        return url

    def generate_model_card(
        self,
        *args: Any,
        accuracy: float | None = None,
        dense_accuracy: float | None = None,
        latency: Latency | None = None,
        **options: Any,
    ) -> ModelCard:
        """The model card: size, ranks of every layer and the given numbers; nothing is measured.

        Args:
            args: See `huggingface_hub.ModelHubMixin`.
            accuracy: Accuracy in percent.
            dense_accuracy: Accuracy of the dense network in percent.
            latency: Result of `measure_latency`.
            options: See `huggingface_hub.ModelHubMixin`.
        """
        return super().generate_model_card(
            *args,
            name=type(self).__name__,
            size=summary(self),  # type: ignore[arg-type]
            shape=format_shape,
            accuracy=accuracy,
            dense_accuracy=dense_accuracy,
            latency=latency,
            **options,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self, save_directory / "model.safetensors")  # type: ignore[arg-type]

    @classmethod
    def _load_as_safetensor(
        cls, model: Any, model_file: str, map_location: str, strict: bool
    ) -> Any:
        load(model_file, model)
        return model.to(map_location).eval()

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        raise CheckpointError(
            f"{model_file}: is a pickle, and pickles are not read; expected a repository with a "
            "model.safetensors that save_pretrained wrote"
        )


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected UTF-8 text") from error
