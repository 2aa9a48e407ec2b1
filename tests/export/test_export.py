"""What is written computes what the model does, for any batch, and without this library."""

import copy
import subprocess
import sys

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import tdlrt
from export.networks import NETWORKS, dense, lenet5
from tdlrt.errors import ExportError, MissingExtraError, NonFiniteError, UnknownNameError
from tdlrt.export import FORMATS, export, load_network, load_plain

PARITY = 1e-5


def outputs(model, inputs):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(inputs)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_computes_what_the_model_does(name, format, tmp_path):
    model, inputs = NETWORKS[name]()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "folder" / "file"
    report = export(model, path, inputs, format=format)
    assert (report.path, report.format, report.int8) == (path, format, False)
    assert report.parity < PARITY
    assert report.bytes == path.stat().st_size
    plain = tdlrt.to_plain(model.eval(), input_size=inputs.shape, fuse_batch_norm=True)
    assert report.parameters == sum(p.numel() for p in plain.parameters())
    network = load_network(path, format, model)
    for size in (1, 7):
        batch = torch.randn(size, *inputs.shape[1:])
        expected = outputs(model, batch)
        with torch.no_grad():
            error = (network(batch) - expected).abs().max() / expected.abs().max()
        assert error < PARITY
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plain_file_goes_into_the_dense_network(name, tmp_path):
    model, inputs = NETWORKS[name]()
    export(model, tmp_path / "file", inputs, format="plain")
    start = dense(name).eval()
    before = copy.deepcopy(start.state_dict())
    network = load_plain(tmp_path / "file", start)
    torch.testing.assert_close(outputs(network, inputs), outputs(model, inputs))
    assert not any(
        "tdlrt" in type(module).__module__
        for module in network.modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)
    )
    assert all(torch.equal(tensor, before[key]) for key, tensor in start.state_dict().items())


def test_a_layer_in_two_places_and_a_model_that_is_one_layer(tmp_path):
    layer = tdlrt.nn.TuckerLinear(12, 12, rank=3)
    shared, inputs = nn.Sequential(layer, nn.ReLU(), layer), torch.randn(3, 12)
    export(shared, tmp_path / "shared", inputs, format="plain")
    network = load_plain(tmp_path / "shared", copy.deepcopy(shared))
    torch.testing.assert_close(network(inputs), shared(inputs))
    export(layer, tmp_path / "layer", inputs, format="plain")
    network = load_plain(tmp_path / "layer", nn.Linear(12, 12))
    torch.testing.assert_close(network(inputs), layer(inputs))


def test_batch_norms_stay_if_asked(tmp_path):
    model, inputs = NETWORKS["rescnn"]()
    report = export(model, tmp_path / "file", inputs, format="plain", fuse_batch_norm=False)
    network = load_plain(tmp_path / "file", dense("rescnn"))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 12
    assert report.parity < PARITY


def test_size_of_the_files(tmp_path):
    """Within 5 % of 4 bytes per parameter: no weight is stored twice."""
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 10))
    tdlrt.factorize_(model, rank=100)
    inputs = torch.randn(4, 300)
    for format in FORMATS:
        assert 1 < export(model, tmp_path / format, inputs, format=format).size_ratio < 1.05


def test_what_is_preferred(tmp_path):
    model = nn.Sequential(tdlrt.nn.TuckerConv2d(16, 16, 3, padding=1, rank=0.5)).eval()
    inputs = torch.randn(1, 16, 2, 2)
    sizes = [
        export(model, tmp_path / one, inputs, format="plain", prefer=one).parameters
        for one in ("size", "speed")
    ]
    assert sizes == [8 * 8 * 9 + 2 * 16 * 8 + 16, 16 * 16 * 9 + 16]
    with pytest.raises(tdlrt.PathError, match=r"^prefer: got 'small'"):
        export(model, tmp_path / "small", inputs, format="plain", prefer="small")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_int8(format, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 96), nn.Linear(96, 10)
    )
    tdlrt.factorize_(model, rank=0.5, init_scale=1.0)
    inputs, calibration = torch.randn(8, 3, 8, 8), torch.randn(150, 3, 8, 8)
    path = tmp_path / "file"
    report = export(model, path, inputs, format=format, calibration=calibration)
    assert report.int8
    assert 1e-4 < report.parity < 0.05
    assert 0.25 < report.size_ratio < 0.35
    assert load_network(path, format, model)(torch.randn(7, 3, 8, 8)).shape == (7, 10)


@pytest.mark.slow
def test_the_first_axis_of_an_onnx_file_is_called_batch(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 3))
    tdlrt.factorize_(model, rank=3)
    export(model, tmp_path / "net.onnx", torch.randn(4, 64), format="onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_int8_weights_of_onnx_have_seven_bits(tmp_path):
    """Products of 8-bit weights, added in pairs, overflow on CPUs without VNNI."""
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    path = tmp_path / "file"
    export(model, path, torch.randn(4, 64), format="onnx", calibration=torch.randn(50, 64))
    weights = [
        numpy_helper.to_array(tensor).astype(int)
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert [abs(weight).max() for weight in weights] == [64, 64]


WITHOUT_US = """
import sys
for name in {absent}:
    sys.modules[name] = None  # importing it is an error
import json, torch
inputs = torch.load({folder!r} + "/inputs.pt", weights_only=True)
{load}
assert metadata == "text", metadata
torch.save(outputs, {folder!r} + "/outputs.pt")
"""
LOAD_PT2 = """
import torch.ao.quantization.fx._decomposed
extra = {"metadata.json": ""}
network = torch.export.load(sys.argv[1], extra_files=extra).module()
outputs, metadata = network(inputs).detach(), json.loads(extra["metadata.json"])["key"]
"""
LOAD_ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
outputs = torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])
metadata = session.get_modelmeta().custom_metadata_map["key"]
"""
LOAD_PLAIN = """
from safetensors import safe_open
from torch import nn
with safe_open(sys.argv[1], "pt") as file:
    header = file.metadata()
    tensors = {name: file.get_tensor(name) for name in file.keys()}
network = nn.Sequential()
network.conv1 = nn.Conv2d(1, 20, 5, padding=2)
network.relu1, network.pool1 = nn.ReLU(), nn.MaxPool2d(2)
network.conv2 = nn.Conv2d(20, 50, 5, padding=2)
network.relu2, network.pool2, network.flatten = nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
network.fc1, network.relu3, network.head = nn.Linear(200, 500), nn.ReLU(), nn.Linear(500, 10)
for name, stages in json.loads(header["layers"]).items():
    made = [getattr(nn, stage.pop("kind"))(**stage) for stage in stages]
    setattr(network, name, made[0] if len(made) == 1 else nn.Sequential(*made))
network.load_state_dict(tensors)
outputs, metadata = network(inputs).detach(), header["key"]
"""


@pytest.mark.parametrize(
    ("format", "absent", "load"),
    [
        ("plain", ["tdlrt"], LOAD_PLAIN),
        ("pt2", ["tdlrt", "torchao"], LOAD_PT2),
        ("onnx", ["tdlrt", "onnxscript"], LOAD_ONNX),
    ],
    ids=["plain", "pt2", "onnx"],
)
def test_the_file_needs_nothing_of_ours(format, absent, load, tmp_path):
    model, inputs = lenet5()
    export(model, tmp_path / "file", inputs, format=format, metadata={"key": "text"})
    torch.save(inputs, tmp_path / "inputs.pt")
    script = WITHOUT_US.format(absent=absent, folder=str(tmp_path), load=load)
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], check=True)
    found = torch.load(tmp_path / "outputs.pt", weights_only=True)
    torch.testing.assert_close(found, outputs(model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_no_file_says_where_it_was_made(format, tmp_path):
    model, inputs = lenet5()
    export(model, tmp_path / "file", inputs, format=format)
    data = (tmp_path / "file").read_bytes()
    if format == "pt2":
        import zipfile

        with zipfile.ZipFile(tmp_path / "file") as archive:
            data = b"".join(map(archive.read, archive.namelist()))
    assert b"tdlrt" not in data
    assert b".py" not in data


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Nothing(nn.Module):
    def forward(self, x):
        return x / 0


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("model", "inputs", "options", "error", "message"),
    [
        (nn.Identity(), X, {"format": "onxx"}, UnknownNameError, "unknown format 'onxx'. Known"),
        (nn.Identity(), X[:0], {}, ExportError, r"inputs: got a tensor of shape \(0, 3\)"),
        (nn.Identity(), X.sum(), {}, ExportError, r"inputs: got a tensor of shape \(\)"),
        (
            nn.Identity(),
            X,
            {"calibration": torch.ones(9, 4)},
            ExportError,
            r"calibration: got a tensor of shape \(9, 4\), expected .* of shape \(3,\)",
        ),
        (
            nn.Identity(),
            X,
            {"calibration": X, "format": "plain"},
            ExportError,
            "'plain' with calibration: torch's plain layers compute in floats",
        ),
        (
            nn.Identity(),
            X,
            {"calibration": X, "format": "pt2"},
            ExportError,
            "calibration: torchao finds nothing in Identity",
        ),
        (Pair(), X, {}, ExportError, "returned a tuple, expected one tensor"),
        (Nothing(), X, {}, NonFiniteError, "outputs are not finite; nothing was written"),
        (Branching(), X, {"format": "pt2"}, ExportError, "cannot trace Branching .*'plain'"),
    ],
)
def test_bad_input(model, inputs, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export(model, tmp_path / "file", inputs, **options)
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_taken(tmp_path):
    model, inputs = lenet5()
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ExportError, match="exists already; choose another path"):
        export(model, path, inputs, format="plain")
    assert path.read_text() == "mine"
    export(model, path, inputs, format="plain", overwrite=True)
    assert path.read_bytes() != b"mine"
    with pytest.raises(ExportError, match="is a folder"):
        export(model, tmp_path, inputs, format="plain", overwrite=True)


def test_an_export_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("mine")
    monkeypatch.setattr("tdlrt.files.os.fsync", lambda handle: 1 / 0)
    model, inputs = lenet5()
    with pytest.raises(ZeroDivisionError):
        export(model, path, inputs, format="plain", overwrite=True)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("format", "absent", "calibration"),
    [("onnx", "onnxruntime", None), ("onnx", "onnxscript", None), ("pt2", "torchao", 3)],
)
def test_a_missing_package_is_named(format, absent, calibration, tmp_path, monkeypatch):
    model, inputs = lenet5()
    for name in [name for name in sys.modules if name.partition(".")[0] == absent]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    options = {} if calibration is None else {"calibration": inputs}
    with pytest.raises(MissingExtraError, match=rf"{absent}.*pip install 'tdlrt\[export\]'"):
        export(model, tmp_path / "file", inputs, format=format, **options)
    assert not list(tmp_path.iterdir())


class Tokens(nn.Module):
    """A table of token vectors that is also the weight of the head."""

    def __init__(self, transformer=False):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.head.weight = self.table.weight
        self.body = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        if transformer:
            self.body = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)

    def forward(self, tokens):
        return self.head(self.body(self.table(tokens)).mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_int8_of_tied_embeddings(format, tmp_path):
    torch.manual_seed(0)
    model = Tokens()
    tdlrt.factorize_(model, rank=0.3, init_scale=1.0)
    tokens, calibration = torch.randint(50, (4, 7)), torch.randint(50, (150, 7))
    report = export(model, tmp_path / "file", tokens, format=format, calibration=calibration)
    assert 1e-4 < report.parity < 0.1
    found = load_network(tmp_path / "file", format, model)(tokens)
    expected = outputs(model, tokens)
    assert (found - expected).abs().max() / expected.abs().max() == pytest.approx(report.parity)


def with_adapters(make):
    model, inputs = make()
    tdlrt.add_adapters_(model, rank=2, train=list(dict(model.named_children()))[-1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("core") or "trained" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, inputs


def norms():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
    net.append(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    return net, torch.randn(3, 3, 6, 6)


def transformer():
    torch.manual_seed(0)
    return Tokens(transformer=True).eval(), torch.randint(50, (3, 7))


@pytest.mark.parametrize("fuse_batch_norm", [False, True])
@pytest.mark.parametrize("make", [norms, transformer])
def test_a_plain_file_has_the_adapters_merged(make, fuse_batch_norm, tmp_path):
    if make is transformer:
        model, inputs = make()
        tdlrt.add_adapters_(model, rank=2, include="body.linear?")
        nn.init.normal_(model.body.linear1.update.core)
    else:
        model, inputs = with_adapters(make)
    report = export(
        model, tmp_path / "file", inputs, format="plain", fuse_batch_norm=fuse_batch_norm
    )
    start = make()[0]
    network = load_plain(tmp_path / "file", start).eval()
    torch.testing.assert_close(outputs(network, inputs), outputs(model, inputs))
    assert report.model_parameters == sum(p.numel() for p in model.parameters())
    assert report.parameters == sum(p.numel() for p in network.parameters())


def test_a_plain_file_of_a_transformer_runs_in_evaluation(tmp_path):
    model, tokens = transformer()
    tdlrt.factorize_(model, rank=2, include="body.linear?")
    export(model, tmp_path / "file", tokens, format="plain")
    network = load_plain(tmp_path / "file", transformer()[0])
    torch.testing.assert_close(outputs(network, tokens), outputs(model, tokens))


def test_loaded_layers_keep_what_the_layers_of_the_model_have(tmp_path):
    model, inputs = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), torch.randn(2, 32)
    start = copy.deepcopy(model)
    tdlrt.factorize_(model, rank=2, include="*")
    export(model, tmp_path / "file", inputs, format="plain")
    start[0].eval().weight.requires_grad_(False)
    start[1].register_forward_hook(lambda *_: torch.zeros(1))
    network = load_plain(tmp_path / "file", start)
    assert [module.training for module in network] == [False, True]
    frozen = [name for name, one in network.named_parameters() if not one.requires_grad]
    assert frozen == ["0.0.weight", "0.1.weight"]
    assert torch.equal(network(inputs), torch.zeros(1))
