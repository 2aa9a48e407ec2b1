import importlib
import json
import sys

import pytest
import torch
from torch import nn

import tdlrt
from tdlrt.errors import MissingExtraError
from tdlrt.integrations.hub import Latency, TuckerHubMixin, measure_latency

LATENCY = Latency(
    milliseconds=0.25, dense_milliseconds=0.5, input_size=(1, 3, 8, 8), conditions="a CPU"
)


class Network(nn.Module, TuckerHubMixin, license="mit"):
    def __init__(self, width: int = 4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3)
        self.conv2 = nn.Conv2d(width, 16, 3)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(torch.relu(self.conv2(self.conv1(x))).mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = Network(width=8)
    tdlrt.factorize_(network, rank={"conv2": (5, 3, 2, 3)})
    return network


def card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_ranks_and_arguments_come_back_from_a_folder(tmp_path, network):
    network.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    assert json.loads((tmp_path / "config.json").read_text()) == {"width": 8}
    restored = Network.from_pretrained(tmp_path)
    assert tdlrt.summary(restored).ranks == {"conv2": (5, 3, 2, 3)}
    assert not restored.training
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(restored(x), network.eval()(x))


def test_a_dense_network_comes_back_too(tmp_path):
    network = Network().eval()
    network.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(Network.from_pretrained(tmp_path)(x), network(x))
    assert "No layer is in Tucker format." in card(tmp_path)


def test_arguments_of_another_network_are_refused(tmp_path, network):
    network.save_pretrained(tmp_path)
    with pytest.raises(tdlrt.CheckpointError, match=r"layer 'conv2': ranks .* do not fit"):
        Network.from_pretrained(tmp_path, width=2)


def test_the_card_holds_the_rank_table(tmp_path, network):
    network.save_pretrained(tmp_path)
    text, size = card(tmp_path), tdlrt.summary(network)
    assert "\n| conv1 | 8x3x3x3 | - | 216 | 216 |\n" in text
    assert f"\n| conv2 | 16x8x3x3 | 5x3x2x3 | {size.parameters} | 1,152 |\n" in text
    assert f"\n| parameters | {size.network_parameters} | 1,426 |\n" in text
    assert f"{100 * size.compression:.1f} % of the weights in Tucker format" in text
    assert f"{100 * size.network_compression:.1f} % of all parameters" in text
    assert "library_name: tdlrt" in text
    assert "license: mit" in text
    assert "https://arxiv.org/abs/2305.19059" in text


def test_what_was_not_given_is_left_out(tmp_path, network):
    network.save_pretrained(tmp_path)
    assert "accuracy" not in card(tmp_path).lower()
    assert "latency" not in card(tmp_path).lower()
    assert "None" not in card(tmp_path)


def test_what_was_given_is_there(tmp_path, network):
    network.save_pretrained(tmp_path, model_card_kwargs={"accuracy": 99.25, "latency": LATENCY})
    assert "\n| accuracy (%) | 99.25 |  |\n" in card(tmp_path)
    assert "\n| latency (ms) | 0.250 | 0.500 |\n" in card(tmp_path)
    assert "1x3x8x8 (a CPU)." in card(tmp_path)


def test_saving_again_renews_the_numbers_and_keeps_the_text(tmp_path, network):
    network.save_pretrained(tmp_path, model_card_kwargs={"accuracy": 50.0})
    readme = tmp_path / "README.md"
    readme.write_text(card(tmp_path).replace("# Network", "# My own \\1 title") + "The end.\n")
    other = Network()
    tdlrt.factorize_(other, rank={"conv2": (2, 2, 3, 3)})
    other.save_pretrained(tmp_path, model_card_kwargs={"dense_accuracy": 60.0})
    text = card(tmp_path)
    assert "# My own \\1 title" in text
    assert text.endswith("The end.\n")
    assert "| conv2 | 16x4x3x3 | 2x2x3x3 |" in text
    assert "5x3x2x3" not in text
    assert "\n| accuracy (%) |  | 60.0 |\n" in text
    assert text.count("\n| parameters |") == 1


def test_a_card_of_the_user_is_left_alone(tmp_path, network):
    (tmp_path / "README.md").write_text("Mine.\n")
    network.save_pretrained(tmp_path)
    assert card(tmp_path) == "Mine.\n"


def test_a_folder_without_weights(tmp_path, network):
    network.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(tdlrt.CheckpointError, match=r"model\.safetensors: there is no such file"):
        Network.from_pretrained(tmp_path)


def test_a_repository_with_a_pickle_alone_is_refused(tmp_path, monkeypatch):
    from huggingface_hub import errors, hub_mixin

    def download(*, filename, **_):
        if filename.endswith(".safetensors"):
            raise errors.LocalEntryNotFoundError(filename)
        (tmp_path / filename).write_text("{}")
        return str(tmp_path / filename)

    monkeypatch.setattr(hub_mixin, "hf_hub_download", download)
    with pytest.raises(
        tdlrt.CheckpointError, match=r"pytorch_model\.bin: is a pickle, and pickles are n"
    ):
        Network.from_pretrained("someone/something")


def test_latency_is_measured_on_request_and_changes_nothing(network):
    network.train()
    latency = measure_latency(network, (1, 3, 8, 8), seconds=0.01)
    assert 0 < latency.milliseconds < 1000
    assert 0 < latency.dense_milliseconds < 1000
    assert latency.input_size == (1, 3, 8, 8)
    assert latency.conditions.startswith("CPU, threads: ")
    assert network.training
    assert tdlrt.summary(network).ranks == {"conv2": (5, 3, 2, 3)}


def test_latency_of_a_model_of_tokens():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 4))
    tdlrt.factorize_(model, rank=0.25)
    tokens = torch.randint(50, (2, 7))
    latency = measure_latency(model, seconds=0.01, example_inputs=tokens)
    assert latency.milliseconds > 0
    assert latency.input_size == (2, 7)
    named = measure_latency(model, seconds=0.01, example_inputs={"input": tokens})
    assert named.input_size == (2, 7)


def test_latency_needs_one_way_to_make_an_input(network):
    with pytest.raises(ValueError, match="input_size: got None, expected the shape of an input"):
        measure_latency(network)
    with pytest.raises(ValueError, match="together with example_inputs, expected one of them"):
        measure_latency(network, (1, 3, 8, 8), example_inputs=torch.zeros(1, 3, 8, 8))


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "tdlrt.integrations.hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"huggingface_hub, which .*'tdlrt\[hf\]'"):
        importlib.import_module("tdlrt.integrations.hub")
