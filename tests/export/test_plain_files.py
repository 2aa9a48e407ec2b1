"""Plain files that are broken, foreign or crafted."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import tdlrt
from export.networks import dense, lenet5
from tdlrt.errors import ExportError
from tdlrt.export import export, load_network, load_plain


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "file"
    model, inputs = lenet5()
    export(model, path, inputs, format="plain")
    return path.read_bytes()


def header(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"]


def changed(data, name, *, stages=None, **arguments):
    """The file with other stages of a layer, or other arguments for the first one."""
    layers = json.loads(header(data)["layers"])
    layers[name] = layers[name] if stages is None else stages
    if stages is None:
        layers[name][0] |= arguments
    return save(load(data), {**header(data), "layers": json.dumps(layers)})


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def renamed(data, old, new):
    layers = json.loads(header(data)["layers"])
    layers[new] = layers.pop(old)
    return save(load(data), {**header(data), "layers": json.dumps(layers)})


BROKEN = {
    "empty": (lambda data: b"", "not a readable export"),
    "cut": (lambda data: data[:-100], "not a readable export"),
    "foreign": (lambda data: save({"w": torch.ones(3)}), "version None; expected a file that"),
    "newer": (lambda data: save(load(data), header(data) | {"plain": "2"}), "version '2'"),
    "no layers": (lambda data: save(load(data), {"plain": "1"}), "not a readable export"),
    "no json": (lambda data: save(load(data), {"plain": "1", "layers": "{"}), "not a readable"),
    "list": (lambda data: save(load(data), {"plain": "1", "layers": "[1]"}), "not a readable"),
    "no list": (
        lambda data: save(load(data), {"plain": "1", "layers": '{"fc1": 3}'}),
        "no layers by name",
    ),
    "no stage": (lambda data: changed(data, "fc1", stages=[]), "no layers by name"),
    "stage": (lambda data: changed(data, "fc1", stages=[3]), "layer 'fc1': class None; expected"),
    "class": (lambda data: changed(data, "fc1", kind="LSTM"), "layer 'fc1.0': class 'LSTM'"),
    "class list": (lambda data: changed(data, "fc1", kind=["Linear"]), r"class \['Linear'\]; exp"),
    "argument": (lambda data: changed(data, "fc1", cell=3), "fc1.0': Linear with 'cell' 3; expec"),
    "device": (lambda data: changed(data, "fc1", device="cpu"), "Linear with 'device' 'cpu'; exp"),
    "dtype": (lambda data: changed(data, "fc1", dtype="f"), "Linear with 'dtype' 'f'; expected"),
    "negative": (lambda data: changed(data, "fc1", out_features=-3), "with 'out_features' -3; ex"),
    "true": (lambda data: changed(data, "fc1", out_features=True), "with 'out_features' True; ex"),
    "bias": (lambda data: changed(data, "fc1", bias=1), "Linear with 'bias' 1; expected"),
    "missing": (lambda data: changed(data, "conv1", groups=None), "with 'groups' None; expected"),
    "kernel": (lambda data: changed(data, "conv1", kernel_size=[1]), r"'kernel_size' \[1\]; exp"),
    "stride": (lambda data: changed(data, "conv1", stride=[1, 0]), r"with 'stride' \[1, 0\]; ex"),
    "padding": (lambda data: changed(data, "conv1", padding="most"), "with 'padding' 'most'; ex"),
    "deep": (
        lambda data: changed(data, "conv1", stride=nested(300)),
        r"Conv2d with 'stride' \[\[\[.*\.\.\.",
    ),
    "identities": (
        lambda data: changed(data, "fc1", stages=[{"kind": "Identity"}] * 33),
        "layer 'fc1': 33 stages, expected at most 32",
    ),
    "no weight": (lambda data: renamed(data, "fc1", "fc7"), r"no fc7\.0\.weight"),
    "flatten": (
        lambda data: changed(data, "fc1", stages=[{"kind": "Flatten", "start_dim": 99}]),
        "Flatten with 'start_dim' 99; expected start_dim, end_dim",
    ),
    "nowhere": (lambda data: save({}, {"plain": "1", "layers": "{}"}), "does not fit the model"),
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


def test_what_a_file_claims_is_not_allocated(tmp_path, monkeypatch):
    """392 bytes that stand for a layer of 1.5 GB, with `device` or without."""
    asked = []
    monkeypatch.setattr(nn, "Linear", lambda *_, **arguments: asked.append(arguments))
    for more in ({}, {"device": "cpu"}, {"dtype": "float64"}):
        stage = {"kind": "Linear", "in_features": 20_000, "out_features": 20_000, "bias": False}
        layers = json.dumps({"0": [stage | more]})
        content = save({"w": torch.ones(1)}, {"plain": "1", "layers": layers})
        (tmp_path / "file").write_bytes(content)
        assert len(content) < 500
        with pytest.raises(ExportError, match=r"no 0\.weight|Linear with 'd"):
            load_plain(tmp_path / "file", nn.Sequential(nn.ReLU()))
    assert not asked


def test_tensors_are_read_once_all_shapes_fit(data, tmp_path, monkeypatch):
    """A hole in a file takes no disk, but as much memory as any tensor once it is read."""
    entries = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    size = sum(len(tensor.numpy().tobytes()) for tensor in load(data).values())
    entries["hole"] = {"dtype": "U8", "shape": [2**32], "data_offsets": [size, size + 2**32]}
    text = json.dumps(entries).encode()
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with path.open("ab") as file:
        file.truncate(8 + len(text) + size + 2**32)
    with pytest.raises(ExportError, match=r"hole: shape \(4294967296,\) in the file, None in"):
        load_plain(path, dense("lenet5"))


def test_the_network_does_not_change_with_its_file(data, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(data)
    network = load_plain(path, dense("lenet5"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with path.open("r+b") as file:
        file.write(bytes(len(data)))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


PLACES = {
    "nothing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "pipe": (os.mkfifo, "is not a regular file"),
}


@pytest.mark.parametrize(("make", "reason"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("format", ["plain", "onnx", "pt2"])
def test_what_is_no_file(tmp_path, make, reason, format):
    make(tmp_path / "file")
    with pytest.raises(ExportError, match=rf"file: cannot be read \({reason}.*; expected"):
        load_network(tmp_path / "file", format, nn.Linear(2, 2))


def test_a_disk_without_room(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match=r"file: cannot be written \(No space left on device\)"):
        export(dense("lenet5"), path, lenet5()[1], format="plain", overwrite=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a\0b", "a" * 300])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(ExportError, match="cannot be written"):
        export(dense("lenet5"), tmp_path / name, lenet5()[1], format="plain")
    with pytest.raises(ExportError, match="cannot be read"):
        load_plain(tmp_path / name, dense("lenet5"))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    path = tmp_path_factory.mktemp("attention") / "file"
    model = Attention()
    tdlrt.factorize_(model, rank=2)
    export(model, path, torch.randn(2, 3, 8), format="plain")
    return path.read_bytes()


INNER = {"q": [2], "k": [2], "v": [2], "out": [2]}
ATTENTION = {
    "a negative size": ({"embed_dim": -8}, "MultiheadAttention with 'embed_dim' -8; expected"),
    "a probability": ({"dropout": 3}, "MultiheadAttention with 'dropout' 3; expected"),
    "a device": ({"device": "cpu"}, "MultiheadAttention with 'device' 'cpu'; expected"),
    "no inner sizes": ({"inner": None}, "MultiheadAttention with 'inner' None; expected"),
    "a projection too few": ({"inner": {"q": [2]}}, "MultiheadAttention with 'inner'"),
    "an inner size": ({"inner": {**INNER, "q": [-2]}}, "MultiheadAttention with 'inner'"),
    "many factors": ({"inner": {**INNER, "q": [2, 2, 2]}}, "MultiheadAttention with 'inner'"),
    "other factors": ({"inner": {**INNER, "q": [3]}}, "does not fit the model"),
    "no factors": ({"inner": {**INNER, "out": []}}, r"no attention\.out_proj\.weight"),
    "heads": ({"num_heads": 3}, "does not fit the model"),
    "huge": ({"embed_dim": 2**50}, "does not fit the model"),
}


@pytest.mark.parametrize(("arguments", "message"), ATTENTION.values(), ids=ATTENTION)
def test_crafted_attention(attention, arguments, message, tmp_path):
    (tmp_path / "file").write_bytes(changed(attention, "attention", **arguments))
    with pytest.raises(ExportError, match=message):
        load_plain(tmp_path / "file", Attention())
