"""Surgery: what is taken, what is left alone and why, and the way back."""

import copy

import pytest
import torch
from torch import nn

import tdlrt
from tdlrt.surgery import DEFAULT_INIT_SCALE


class Odd(nn.Conv2d):
    """A subclass, which may do anything."""


def everything():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 16, 3, stride=(2, 1), padding="valid", dilation=(1, 2)))
    model.add_module("grouped", nn.Conv2d(16, 16, 3, groups=4))
    model.add_module("up", nn.ConvTranspose2d(16, 16, 2))
    model.add_module("odd", Odd(16, 16, 3, padding=1))
    model.add_module("ring", nn.Conv2d(16, 24, (3, 5), padding=(1, 2), padding_mode="circular"))
    model.add_module("norm", nn.BatchNorm2d(24))
    model.add_module("tiny", nn.Conv2d(24, 1, 1, bias=False))
    model.add_module("flat", nn.Flatten())
    model.add_module("hidden", nn.LazyLinear(40))
    model.add_module("relu", nn.ReLU())
    model.add_module("head", nn.Linear(40, 10))
    model(inputs())
    return model.eval()


def inputs():
    return torch.randn(2, 3, 15, 16, generator=torch.Generator().manual_seed(3))


def notes(report):
    return {row.name: row.note for row in report.skipped}


def test_what_is_factorised_and_what_is_not():
    report = tdlrt.factorize_(everything(), rank=0.5)
    assert [row.name for row in report.factorized] == ["stem", "ring", "hidden"]
    assert notes(report) == {
        "grouped": "grouped (4 groups)",
        "up": "transposed convolution",
        "odd": "Odd is not a plain torch layer",
        "tiny": "too small to save anything",
        "head": "output head",
    }
    text = str(report)
    assert "ring" in text
    assert "3 of 8 layers" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("modes", ["all", "channels"])
def test_full_rank_surgery_changes_no_output(modes):
    model = everything()
    expected = model(inputs())
    tdlrt.factorize_(model, rank="full", modes=modes, include="*")
    assert torch.allclose(model(inputs()), expected, atol=1e-5)


def test_a_dry_run_changes_nothing_and_reports_the_same():
    model = everything()
    before = copy.deepcopy(model.state_dict())
    report = tdlrt.factorize_(model, rank=0.3, dry_run=True)
    assert model.state_dict().keys() == before.keys()
    assert report == tdlrt.factorize_(model, rank=0.3)


def test_ranks_by_pattern():
    report = tdlrt.factorize_(everything(), rank={"stem": (4, 3, 3, 3), "h*": 7})
    assert {row.name: row.ranks for row in report.factorized} == {
        "stem": (4, 3, 3, 3),
        "hidden": (7, 7),
    }
    assert notes(report)["ring"] == "no rank pattern matches"


def test_include_and_exclude():
    report = tdlrt.factorize_(everything(), include=["*e*"], exclude="stem")
    assert [row.name for row in report.factorized] == ["hidden", "head"]
    assert notes(report)["stem"] == "excluded"
    assert notes(report)["ring"] == "not included"


def test_fractions_leave_small_modes_full():
    report = tdlrt.factorize_(everything(), rank=0.1)
    ranks = {row.name: row.ranks for row in report.factorized}
    assert ranks["stem"] == (2, 3, 3, 3)
    assert ranks["ring"] == (2, 2, 3, 5)


def test_a_rank_cut_by_the_others_is_noted():
    model = nn.Sequential(nn.Conv2d(8, 64, 1))
    report = tdlrt.factorize_(model, rank=0.5)
    assert report.rows[0].ranks == (4, 4, 1, 1)
    assert report.rows[0].note == "rank 32 cut to 4, the others' product"


@pytest.mark.parametrize(
    ("rank", "scale"),
    [(0.5, DEFAULT_INIT_SCALE), ("full", 1.0), (tdlrt.RelativeTolerance(0.0), 1.0)],
)
def test_the_norm_of_the_start(rank, scale):
    model = everything()
    norm = model.ring.weight.norm()
    tdlrt.factorize_(model, rank=rank)
    assert torch.allclose(model.ring.core.norm(), scale * norm)


def test_init_scale_by_hand():
    model = everything()
    norm = model.ring.weight.norm()
    tdlrt.factorize_(model, rank=0.2, init_scale=2.0)
    assert torch.allclose(model.ring.core.norm(), 2 * norm)


def test_a_tolerance_keeps_the_weight_within_it():
    model = everything()
    weight = model.ring.weight.detach().clone()
    tdlrt.factorize_(model, rank=tdlrt.RelativeTolerance(0.4))
    error = (model.ring.dense_weight() - weight).norm()
    assert 0 < error <= 0.4 * weight.norm()


def test_shared_modules_stay_shared_and_biases_keep_their_parameter():
    shared = nn.Linear(30, 30)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(30, 2))
    report = tdlrt.factorize_(model)
    assert len(report.rows) == 2
    assert isinstance(model[0], tdlrt.nn.TuckerLinear)
    assert model[0] is model[2]
    assert model[0].bias is shared.bias


def test_training_mode_and_frozen_weights_are_kept():
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 2))
    model[0].requires_grad_(False).eval()
    tdlrt.factorize_(model)
    assert not model[0].training
    assert not any(p.requires_grad for p in model[0].parameters())
    assert model[1].training
    assert all(p.requires_grad for p in model[1].parameters())


def test_tied_weights_and_hooks_are_left_alone():
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(4)), nn.Linear(30, 2))
    model[1].weight = model[0].weight
    model[2].register_forward_hook(lambda *_: None)
    report = tdlrt.factorize_(model)
    assert [row.name for row in report.factorized] == ["3"]
    assert notes(report)["0"] == notes(report)["1"] == "weight tied to another layer"
    assert notes(report)["2"] == "has hooks, which would be lost"


def test_parametrised_weights_are_left_alone():
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    report = tdlrt.factorize_(model)
    assert [row.name for row in report.factorized] == ["1"]


def test_nothing_to_factorise():
    with pytest.raises(tdlrt.NothingMatchedError, match="no layer can be factorised") as error:
        tdlrt.factorize_(nn.Sequential(nn.Linear(30, 10)))
    assert "output head" in str(error.value)
    with pytest.raises(tdlrt.NothingMatchedError, match="no layer can be factorised"):
        tdlrt.factorize_(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("argument", ["include", "exclude", "rank"])
def test_a_pattern_that_matches_nothing(argument):
    value = {"convolution*": 3} if argument == "rank" else "convolution*"
    with pytest.raises(
        tdlrt.NothingMatchedError, match=rf"^{argument}: the pattern 'convolution\*' .*stem, gr"
    ):
        tdlrt.factorize_(everything(), **{argument: value})


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank: got 0, expected"),
        (-3, "rank: got -3"),
        (0.0, "the fraction 0.0"),
        (1.5, "the fraction 1.5"),
        (True, "rank: got True"),
        ("half", "rank: got 'half'"),
        (None, "rank: got None"),
        ((4, 3), "2 ranks .* for a weight of 4 modes"),
        ((17, 3, 3, 3), "got 17 for mode 0 of size 16, expected an int from 1 to 16"),
        ((4, 0, 3, 3), "got 0 for mode 1"),
    ],
)
def test_bad_ranks_leave_the_model_as_it_was(rank, message):
    model = everything()
    before = model.state_dict().keys()
    with pytest.raises(tdlrt.RankError, match=message):
        tdlrt.factorize_(model, rank={"ring": 0.5, "stem": rank})
    assert model.state_dict().keys() == before


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), "big"])
def test_bad_init_scale(scale):
    with pytest.raises(tdlrt.RankError, match=r"init_scale: got .* expected a positive number"):
        tdlrt.factorize_(everything(), init_scale=scale)


def test_bad_modes():
    with pytest.raises(tdlrt.RankError, match="modes: got 'spatial', expected 'all' or 'channels'"):
        tdlrt.factorize_(everything(), modes="spatial")


def test_non_finite_weights_are_refused():
    model = everything()
    model.ring.weight.data[0, 0] = float("nan")
    before = model.state_dict().keys()
    with pytest.raises(tdlrt.NonFiniteError, match="cannot be factorised"):
        tdlrt.factorize_(model)
    assert model.state_dict().keys() == before


def test_a_single_layer_cannot_be_replaced_in_place():
    with pytest.raises(tdlrt.UnsupportedLayerError, match="got a single Linear"):
        tdlrt.factorize_(nn.Linear(30, 30))


@pytest.mark.parametrize("convert", [tdlrt.to_plain, tdlrt.to_dense])
@pytest.mark.parametrize("modes", ["all", "channels"])
@pytest.mark.parametrize("rank", [0.4, "full"])
def test_the_way_back(convert, modes, rank):
    model = everything()
    tdlrt.factorize_(model, rank=rank, modes=modes)
    state = copy.deepcopy(model.state_dict())

    converted = convert(model)

    assert all(
        type(module).__module__.startswith("torch.") or isinstance(module, Odd)
        for module in converted.modules()
    )
    assert torch.allclose(converted(inputs()), model(inputs()), atol=1e-5)
    assert not converted.training
    assert {id(p) for p in converted.parameters()}.isdisjoint(id(p) for p in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    if convert is tdlrt.to_dense:
        assert converted.state_dict().keys() == everything().state_dict().keys()


@pytest.mark.parametrize(
    "layer",
    [
        tdlrt.nn.TuckerConv1d(6, 8, 3, stride=2, padding="valid", rank=0.5),
        tdlrt.nn.TuckerConv2d(6, 8, (3, 2), dilation=2, padding="same", rank=0.5, bias=False),
        tdlrt.nn.TuckerConv3d(6, 8, 2, padding=1, padding_mode="replicate", rank=0.5),
        tdlrt.nn.TuckerLinear(6, 8, rank=2),
    ],
)
@pytest.mark.parametrize("convert", [tdlrt.to_plain, tdlrt.to_dense])
def test_a_layer_alone_converts_too(layer, convert):
    spatial = layer.core.ndim - 2
    inputs = torch.randn(2, 6, *[9] * spatial)
    assert torch.allclose(convert(layer)(inputs), layer(inputs), atol=1e-5)


def with_batch_norms():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16, affine=False),
        nn.BatchNorm2d(16, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(16 * 6 * 6, 40),
        nn.BatchNorm1d(40),
        nn.Linear(40, 10),
    )
    tdlrt.factorize_(model, rank=0.4)
    for _ in range(3):
        model(1 + 3 * torch.randn(8, 3, 8, 8))
    return model.eval()


class Untraceable(nn.Module):
    """What torch.fx cannot follow."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) if x.sum() < float("inf") else x


class Branching(nn.Module):
    """A batch norm that is not all there is after its convolution."""

    def __init__(self, used_twice):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.used_twice = used_twice

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y + (self.norm(x) if self.used_twice else self.conv.weight.mean())


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("wrap", [nn.Sequential, Untraceable])
@pytest.mark.parametrize("input_size", [None, (2, 3, 8, 8)])
def test_batch_norms_are_fused_on_request(wrap, input_size):
    model = wrap(with_batch_norms()).eval()
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    state = copy.deepcopy(model.state_dict())
    assert len(norms(tdlrt.to_plain(model, input_size=input_size))) == 4
    plain = tdlrt.to_plain(model, input_size=input_size, fuse_batch_norm=True)
    assert torch.allclose(plain(x), expected, atol=1e-5)
    # The one without statistics stays, and without an input size that after the linear layer.
    assert len(norms(plain)) == (2 if input_size is None else 1)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not plain.training


def test_batch_norms_that_are_not_certain_stay():
    x = torch.randn(2, 16, 8, 8)
    shared = nn.BatchNorm2d(16)
    hooked = nn.Conv2d(16, 16, 3)
    hooked.register_forward_hook(lambda *_: None)
    for model in (
        Branching(used_twice=True),
        Branching(used_twice=False),
        nn.Sequential(nn.Conv2d(16, 16, 3), shared, nn.Conv2d(16, 16, 3), shared),
        Untraceable(nn.Sequential(nn.Conv2d(16, 16, 3), shared, nn.Conv2d(16, 16, 3), shared)),
        nn.Sequential(hooked, nn.BatchNorm2d(16)),
        nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.BatchNorm2d(16)),
    ):
        model(x)
        model.eval()
        plain = tdlrt.to_plain(model, fuse_batch_norm=True)
        assert len(norms(plain)) == 1
        assert torch.equal(plain(x), model(x))


def test_batch_norms_in_training_stay():
    model = with_batch_norms().train()
    plain = tdlrt.to_plain(model, input_size=(2, 3, 8, 8), fuse_batch_norm=True)
    assert len(norms(plain)) == 4
    assert plain.training


def test_plain_layers_are_planned_for_the_input_size():
    model = nn.Sequential(tdlrt.nn.TuckerLinear(500, 500, rank=200)).eval()
    many, few = (
        tdlrt.to_plain(model, input_size=(rows, 500), prefer="speed") for rows in (10**4, 1)
    )
    forced = copy.deepcopy(model)
    forced[0].path = "dense"
    x = torch.randn(3, 500)
    for plain in (many, few, tdlrt.to_plain(forced, input_size=(1, 500))):
        assert torch.allclose(plain(x), model(x), atol=1e-5)
    assert isinstance(tdlrt.to_plain(forced, input_size=(1, 500))[0], nn.Linear)
    assert isinstance(few[0], nn.Linear)  # one call less
    assert isinstance(many[0], nn.Sequential)


def test_a_layer_called_twice_is_planned_for_both():
    shared = tdlrt.nn.TuckerLinear(30, 30, rank=4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    plain = tdlrt.to_plain(model, input_size=(2, 30))
    assert plain[0] is plain[2]
    x = torch.randn(2, 30)
    assert torch.allclose(plain(x), model(x), atol=1e-6)
