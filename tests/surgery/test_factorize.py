"""What is taken, and what is left alone and why."""

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import tdlrt
from surgery.networks import everything, inputs


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


@pytest.mark.parametrize(
    ("first", "ranks"),
    [
        (nn.Conv1d(8, 64, 3), (16, 8, 3)),  # 24 x 8 x 3 would be larger than dense
        (nn.Conv2d(12, 16, 3), (8, 12, 3, 3)),
        (nn.Linear(8, 64), (6, 6)),
        (nn.Linear(64, 128), (35, 35)),
        (nn.Linear(65, 128), (33, 33)),
        (nn.Conv2d(4, 16, 3), (8, 4, 3, 3)),
    ],
)
def test_the_inputs_of_a_network_are_kept(first, ranks):
    """What the first layer drops is lost; a later layer, or the only one, gets the fraction."""
    note = "rank 0.5 raised for the network's inputs"
    few = 4 < first.weight.shape[1] <= 64
    for rank in (0.5, {"0": 0.5}):
        model = nn.Sequential(copy.deepcopy(first), nn.Linear(20, 20))
        row = tdlrt.factorize_(model, rank=rank).rows[0]
        assert row.ranks == ranks
        assert row.parameters <= row.dense_parameters
        assert (row.note == note) == few
    for model in (nn.Sequential(nn.Conv2d(3, 8, 3), first), nn.Sequential(first)):
        assert note not in str(tdlrt.factorize_(model, include="*", rank=0.5))
    tensor = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    assert note not in str(tdlrt.factorize_(tensor, reshape={"0": ((64,), (8, 8))}))


def test_a_rank_cut_by_the_others_is_noted():
    model = nn.Sequential(nn.Conv2d(8, 64, 1))
    report = tdlrt.factorize_(model, rank=0.5)
    assert report.rows[0].ranks == (4, 4, 1, 1)
    assert report.rows[0].note == "rank 32 cut to 4, the others' product"


@pytest.mark.parametrize(
    ("rank", "scale"),
    [
        ({"ring": (16, 12, 3, 5)}, (16 * 12 * 3 * 5 + 8 * 16 + 4 * 12) / (24 * 16 * 3 * 5)),
        ("full", 1.0),
        (tdlrt.RelativeTolerance(0.0), 1.0),
    ],
)
def test_the_norm_of_the_start(rank, scale):
    model = everything()
    norm = model.ring.weight.norm()
    tdlrt.factorize_(model, rank=rank)
    assert torch.allclose(model.ring.core.norm(), scale**-0.5 * norm)


def test_a_start_at_low_ranks_has_at_most_half_more_than_the_norm():
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2))
    norm = model[0].weight.norm()
    tdlrt.factorize_(model, rank=1)
    assert torch.allclose(model[0].core.norm(), 1.5 * norm)


def test_a_start_is_not_scaled_beyond_the_norm_that_keeps_a_signal():
    for norm, expected in ((0.1, 0.15), (2**0.5, 2**0.5), (2.0, 2.0)):
        model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 2))
        nn.init.orthogonal_(model[0].weight, norm)  # ||W||^2 = 200 norm^2
        tdlrt.factorize_(model, rank=0.1)
        assert torch.allclose(model[0].core.norm(), torch.tensor(expected * 200**0.5))


def test_layers_start_no_larger_than_dense():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    report = tdlrt.factorize_(model, rank={"0": 0.5, "1": 32})
    assert [row.ranks for row in report.factorized] == [(26, 26), (32, 32)]
    assert report.rows[0].note == "rank 0.5 lowered to the dense size"
    assert report.rows[1].note == "starts larger than dense"


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
    tdlrt.factorize_(model, include=["0", "1"])
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
    assert notes(report)["0"] == notes(report)["1"] == "weight tied to another parameter"
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
        (np.array([4, 4]), r"rank: got array"),
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
    with pytest.raises(tdlrt.RankError, match=rf"{message}.*\(layer 'stem'\)"):
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


def test_a_fraction_fits_the_tensor_that_a_matrix_is_read_as():
    model = nn.Sequential(nn.Linear(36, 64), nn.Linear(64, 2))
    norm = model[0].weight.norm()
    report = tdlrt.factorize_(model, rank=0.95, reshape={"0": ((64,), (6, 6))})
    assert report.rows[0].parameters <= 36 * 64
    assert report.rows[0].note == "rank 0.95 lowered to the dense size"
    assert norm < model[0].core.norm() <= 1.5 * norm


def test_a_fraction_leaves_a_layer_of_few_inputs_dense():
    """The embedding of 2x2 patches has 4 inputs: at rank 3 it would lose a quarter of the image."""
    model = nn.Sequential(
        OrderedDict(
            patches=nn.Conv2d(1, 64, 2, 2),
            flat=nn.Flatten(),
            narrow=nn.Linear(1024, 4),
            wide=nn.Linear(4, 64),
            inner=nn.Linear(64, 64),
            head=nn.Linear(64, 10),
        )
    )
    left = notes(tdlrt.factorize_(model, dry_run=True))
    assert left["patches"] == left["wide"] == "only 4 inputs; name it in include"
    assert left["narrow"] == "only 4 outputs; name it in include"
    for options in ({"include": ["patches"]}, {"rank": 3}, {"rank": {"patches": 3, "*": 0.5}}):
        report = tdlrt.factorize_(model, dry_run=True, **options)
        assert next(row for row in report.rows if row.name == "patches").ranks == (3, 1, 2, 2)
