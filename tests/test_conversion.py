"""to_plain: how large the plain layers are, and which path they follow."""

import copy

import pytest
import torch
from torch import nn

import tdlrt


def size(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("input_size", [None, (1, 16, 8, 8), (64, 16, 8, 8)])
def test_conversion_gives_no_compression_back(input_size):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()).eval()
    tdlrt.factorize_(model, rank=0.5)
    assert size(model) == 8 * 8 * 9 + 2 * 16 * 8 + 2 * 9 + 16 == 866
    plain = tdlrt.to_plain(model, input_size=input_size)
    assert size(plain) == 8 * 8 * 9 + 2 * 16 * 8 + 16
    x = torch.randn(3, 16, 8, 8)
    assert torch.allclose(plain(x), model(x), atol=1e-5)


def test_speed_may_choose_a_dense_layer():
    model = nn.Sequential(tdlrt.nn.TuckerConv2d(16, 16, 3, padding=1, rank=0.5)).eval()
    for input_size in (None, (1, 16, 2, 2)):
        plain = tdlrt.to_plain(model, input_size=input_size, prefer="speed")
        assert size(plain) == 16 * 16 * 9 + 16 == 2320


@pytest.mark.parametrize("modes", ["all", "channels"])
@pytest.mark.parametrize("rank", [1, 0.1, 0.3, 0.5, 0.7, 0.9, "full", (3, 5, 1, 2), (5, 1, 3, 3)])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 24), (3, 24), (24, 5), (24, 24)])
@pytest.mark.parametrize("input_size", [None, (1, 9), (256, 9)])
def test_plain_layers_are_never_larger_unless_a_kernel_mode_is_factorised(
    input_size, inputs, outputs, rank, modes
):
    rank = tuple(map(min, rank, (outputs, inputs, 3, 3))) if isinstance(rank, tuple) else rank
    layers = [
        tdlrt.nn.TuckerConv2d(inputs, outputs, 3, stride=stride, rank=rank, modes=modes)
        for stride in (1, 2)
    ]
    if not isinstance(rank, tuple):
        layers.append(tdlrt.nn.TuckerLinear(inputs, outputs, rank=rank))
    for layer in layers:
        spatial = () if layer.core.ndim == 2 else (input_size and input_size[1],) * 2
        shape = input_size and (input_size[0], inputs, *spatial)
        plain = size(tdlrt.to_plain(layer, input_size=shape))
        assert plain == min(size(layer.to_plain(path)) for path in tdlrt.paths.PATHS)
        if layer.ranks[2:] == layer.shape[2:]:
            assert plain <= size(layer)


def test_a_measured_path_is_followed_for_speed_and_a_path_set_by_hand_always():
    model = nn.Sequential(tdlrt.nn.TuckerLinear(30, 30, rank=3)).eval()
    small, dense = size(model) - 3 * 3, 30 * 30 + 30
    tdlrt.autotune_(model, torch.randn(2, 30))
    model[0].path, model[0].path_is_measured = "dense", True
    twin = copy.deepcopy(model)
    for one in (model, twin):
        assert size(tdlrt.to_plain(one)) == size(one[0].to_plain()) == small
        assert size(tdlrt.to_plain(one, prefer="speed")) == dense
    twin[0].path = "dense"
    assert not twin[0].path_is_measured
    assert size(tdlrt.to_plain(twin)) == dense


@pytest.mark.parametrize("prefer", ["fast", None, 1])
def test_an_unknown_preference_is_refused(prefer):
    with pytest.raises(tdlrt.PathError, match=r"^prefer: got .*, expected 'size' or 'speed'; "):
        tdlrt.to_plain(nn.Sequential(nn.Linear(3, 3)), prefer=prefer)


class TwoInputs(nn.Module):
    """A model of token ids and of numbers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.hidden, self.head = nn.Linear(16, 32), nn.Linear(32, 5)
        self.norm = nn.BatchNorm1d(32)

    def forward(self, tokens, numbers):
        features = torch.cat([self.table(tokens).mean(1), numbers], dim=1)
        return self.head(self.norm(self.hidden(input=features)).relu())


TOKENS, NUMBERS = torch.randint(50, (4, 7)), torch.randn(4, 8)


@pytest.mark.parametrize(
    "example", [(TOKENS, NUMBERS), [TOKENS, NUMBERS], {"numbers": NUMBERS, "tokens": TOKENS}]
)
def test_example_inputs_of_any_kind(example):
    model = TwoInputs().eval()
    tdlrt.factorize_(model, rank=0.2)
    assert tdlrt.summary(model, example_inputs=example).dense_macs == 4 * (16 * 32 + 32 * 5)
    plain = tdlrt.to_plain(model, example_inputs=example, fuse_batch_norm=True)
    assert isinstance(plain.norm, nn.Identity)  # the example shows that features are normalised
    assert torch.allclose(plain(TOKENS, NUMBERS), model(TOKENS, NUMBERS), atol=1e-5)
    assert tdlrt.autotune_(model, example).rows[0].inputs == ((4, 16),)


def test_example_inputs_choose_paths_as_a_size_does():
    model = nn.Sequential(nn.Embedding(50, 500), tdlrt.nn.TuckerLinear(500, 500, rank=200)).eval()
    few, many = (torch.zeros(rows, 1, dtype=torch.long) for rows in (1, 10**4))
    plain = [tdlrt.to_plain(model, example_inputs=one, prefer="speed")[1] for one in (few, many)]
    assert [type(layer) for layer in plain] == [nn.Linear, nn.Sequential]


@pytest.mark.parametrize("read", [tdlrt.summary, tdlrt.to_plain])
def test_a_size_that_a_model_does_not_take(read):
    tokens = nn.Sequential(nn.Embedding(50, 8), tdlrt.nn.TuckerLinear(8, 8, rank=2))
    for model, size in ((tokens, (2, 7)), (TwoInputs(), (2, 7)), (nn.Linear(3, 3), (2, 7))):
        with pytest.raises(ValueError, match=r"^input_size: got \(2, 7\), .*pass example_inputs"):
            read(model, input_size=size)
    with pytest.raises(ValueError, match=r"^input_size: got \(2, 7\) together with example_inputs"):
        read(tokens, input_size=(2, 7), example_inputs=TOKENS)
    with pytest.raises(TypeError, match=r"^example_inputs: got str, expected a tensor"):
        read(tokens, example_inputs="tokens")
    with pytest.raises(tdlrt.UnsupportedLayerError, match=r"^model: 0\.weight has no shape yet"):
        read(nn.Sequential(nn.LazyLinear(3)).eval(), example_inputs=torch.ones(1, 2))
