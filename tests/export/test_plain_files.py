"""Plain files that are broken, foreign or crafted."""

import json
import struct

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from export.networks import dense, lenet5
from tdlrt.errors import ExportError
from tdlrt.export import export, load_plain


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "file"
    model, inputs = lenet5()
    export(model, path, inputs, format="plain")
    return path.read_bytes()


def header(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"]


def changed(data, name, **arguments):
    """The file with other arguments for the first stage of a layer."""
    layers = json.loads(header(data)["layers"])
    layers[name][0] |= arguments
    return save(load(data), {**header(data), "layers": json.dumps(layers)})


BROKEN = {
    "empty": (lambda data: b"", "not a readable export"),
    "cut": (lambda data: data[:-100], "not a readable export"),
    "foreign": (lambda data: save({"w": torch.ones(3)}), "version None; expected a file that"),
    "newer": (lambda data: save(load(data), header(data) | {"plain": "2"}), "version '2'"),
    "no layers": (lambda data: save(load(data), {"plain": "1"}), "not a readable export"),
    "no json": (lambda data: save(load(data), {"plain": "1", "layers": "{"}), "not a readable"),
    "list": (lambda data: save(load(data), {"plain": "1", "layers": "[1]"}), "does not fit"),
    "no list": (
        lambda data: save(load(data), {"plain": "1", "layers": '{"fc1": 3}'}),
        "does not fit the model",
    ),
    "class": (lambda data: changed(data, "fc1", kind="LSTM"), "layer of class 'LSTM'"),
    "argument": (lambda data: changed(data, "fc1", cell=3), "does not fit the model"),
    "negative": (lambda data: changed(data, "fc1", out_features=-3), "does not fit the model"),
    "huge": (lambda data: changed(data, "fc1", out_features=2**50), "does not fit the model"),
    "overflow": (lambda data: changed(data, "fc1", out_features=2**80), "does not fit the model"),
    "shape": (lambda data: changed(data, "fc1", out_features=7), "does not fit the model"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files(data, damage, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(damage(data))
    with pytest.raises(ExportError, match=message) as error:
        load_plain(path, dense("lenet5"))
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("model", [dense("rescnn"), nn.Linear(3, 3)])
def test_another_model(data, model, tmp_path):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ExportError, match="does not fit the model"):
        load_plain(tmp_path / "file", model)
