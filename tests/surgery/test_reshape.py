"""Linear layers whose matrix is a tensor: asked for, found, trained, stored and converted."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tdlrt
from reference.cases import gaussian, laws, relative_error, seeds
from tdlrt.errors import CheckpointError, NothingMatchedError, RankError, UnsupportedLayerError
from tdlrt.export import export, load_plain
from tdlrt.nn import TuckerLinear
from tdlrt.paths import PATHS

MAP = ((20,), (6, 4, 3))
SPLIT = ((4, 5), (6, 4, 3))


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(72, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    ).to(dtype)


def images(dtype=torch.float64):
    return gaussian((7, 2, 4, 3), 1, dtype)


def reshaped(modes=MAP, rank=0.5, dtype=torch.float64):
    model = network(dtype)
    tdlrt.factorize_(model, rank=rank, reshape={"4": modes})
    return model.eval()


def test_factorize_takes_the_modes_by_name():
    model = network()
    report = tdlrt.factorize_(model, rank=0.5, reshape={"4": [[4, 5], [6, 4, 3]]})
    assert [(row.name, row.shape) for row in report.factorized] == [
        ("0", (6, 2, 3, 3)),
        ("4", (4, 5, 6, 4, 3)),
    ]
    layer = model[4]
    assert layer.reshape == SPLIT
    assert (layer.out_features, layer.in_features) == (20, 72)
    assert layer.weight.shape == (20, 72)
    assert layer.dense_weight().shape == layer.shape == (4, 5, 6, 4, 3)
    assert "reshape=((4, 5), (6, 4, 3))" in repr(layer)


def test_the_first_pattern_counts_and_others_stay_matrices():
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)))
    reshape = {"1": ((4, 6), (24,)), "[01]": ((24,), (2, 12))}
    tdlrt.factorize_(model, rank=0.5, reshape=reshape)
    assert [layer.shape for layer in model[:3]] == [(24, 2, 12), (4, 6, 24), (24, 24)]


def test_a_fraction_applies_to_every_mode_of_more_than_four():
    layer = TuckerLinear(400, 60, rank=0.5, reshape=((4, 15), (20, 5, 4)))
    assert layer.ranks == (4, 8, 10, 3, 4)
    report = tdlrt.factorize_(
        nn.Sequential(nn.Linear(400, 60), nn.Linear(60, 2)),
        rank=0.5,
        reshape={"0": ((4, 15), (20, 5, 4))},
    )
    assert "cut to" not in report.rows[0].note


WRONG = [
    ({"fc": MAP}, NothingMatchedError, "'fc' matches no layer"),
    ({"0": MAP}, UnsupportedLayerError, "0 is a Conv2d"),
    ({"*": MAP}, UnsupportedLayerError, "0 is a Conv2d"),
    ({"4": ((21,), (6, 4, 3))}, RankError, r"\(21,\), whose product is 21, expected 20"),
    ({"4": ((20,), (6, 4))}, RankError, "product is 24, expected 72, the in_features"),
    ({"4": (20, 72)}, RankError, "two tuples of sizes"),
    ({"4": ((20,), (6, 4, 3), ())}, RankError, "two tuples of sizes"),
    ({"4": ((20,), (-6, -4, 3))}, RankError, "two tuples of sizes"),
    ({"4": ((20,), ())}, RankError, "two tuples of sizes"),
    ({"4": ((20,), (6, 4.0, 3))}, RankError, "two tuples of sizes"),
    ({"4": "20x72"}, RankError, "two tuples of sizes"),
    (MAP, RankError, "expected a dict from the names of layers"),
    ({4: MAP}, NothingMatchedError, "got 4"),
]


@pytest.mark.parametrize(("reshape", "error", "message"), WRONG)
def test_wrong_modes_are_named_and_change_nothing(reshape, error, message):
    model = network()
    before = list(model.modules())
    with pytest.raises(error, match=message):
        tdlrt.factorize_(model, rank=0.5, reshape=reshape)
    assert list(model.modules()) == before


def test_a_tucker_layer_and_a_subclass_are_not_reshaped():
    model = reshaped()
    with pytest.raises(UnsupportedLayerError, match="4 is a TuckerLinear"):
        tdlrt.factorize_(model, include="6", reshape={"4": MAP})
    with pytest.raises(RankError, match="product is 21"):
        TuckerLinear(72, 20, reshape=((21,), (72,)))


def test_a_report_says_that_a_layer_that_stays_dense_is_not_reshaped():
    report = tdlrt.factorize_(network(), reshape={"4": MAP}, exclude="4")
    notes = {row.name: row.note for row in report.rows}
    assert notes["4"] == "excluded; reshape has no effect"
    assert not any("reshape" in note for name, note in notes.items() if name != "4")


def test_covariances_belong_to_matrices():
    model = network()
    covariances = tdlrt.input_covariances(model, [images()])
    with pytest.raises(RankError, match="leave the layer out of reshape or of covariances"):
        tdlrt.factorize_(model, rank=0.5, reshape={"4": MAP}, covariances=covariances)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.LayerNorm(72)
        self.first, self.pooled, self.head = nn.Linear(72, 20), nn.Linear(6, 20), nn.Linear(20, 5)

    def forward(self, x):
        x = F.relu(self.conv(x))
        y = F.dropout(self.norm(F.relu(x.view(x.size(0), -1))), training=self.training)
        pooled = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.head(self.first(y) + self.pooled(pooled))


def test_layers_behind_flattened_maps_are_found():
    assert tdlrt.flattened_modes(network(), (1, 2, 4, 3)) == {"4": MAP}
    assert tdlrt.flattened_modes(network(), (0, 2, 4, 3)) == {"4": MAP}
    assert tdlrt.flattened_modes(network(), example_inputs=images()) == {"4": MAP}
    assert tdlrt.flattened_modes(Functional(), (1, 2, 4, 3)) == {"first": MAP}
    sequence = nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.Flatten(), nn.Linear(42, 5))
    assert tdlrt.flattened_modes(sequence, (1, 2, 7)) == {"2": ((5,), (6, 7))}


def test_layers_that_mix_features_or_see_several_maps_are_not():
    mixed = nn.Sequential(nn.Flatten(), nn.Linear(24, 24), nn.Linear(24, 5))
    assert tdlrt.flattened_modes(mixed, (1, 2, 4, 3)) == {"1": ((24,), (2, 4, 3))}

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(24, 5)

        def forward(self, x):
            return self.linear(x.flatten(1)) + self.linear(x.mT.flatten(1))

    class Product(Twice):
        def forward(self, x):
            return self.linear(x.flatten(1) @ torch.eye(24))

    assert tdlrt.flattened_modes(Twice(), (1, 2, 4, 3)) == {}
    assert tdlrt.flattened_modes(Product(), (1, 2, 4, 3)) == {}


def test_the_search_changes_nothing_and_names_wrong_inputs():
    model, state = network(), torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    tdlrt.flattened_modes(model, (1, 2, 4, 3))
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="input_size: got None, expected the shape"):
        tdlrt.flattened_modes(model)
    with pytest.raises(ValueError, match="together with example_inputs"):
        tdlrt.flattened_modes(model, (1, 2, 4, 3), example_inputs=images())
    with pytest.raises(ValueError, match="does not take one tensor of zeros"):
        tdlrt.flattened_modes(model, (1, 3, 4, 3))
    with pytest.raises(TypeError, match="input_size"):
        tdlrt.flattened_modes(model, 3)


@pytest.mark.parametrize("modes", [MAP, SPLIT])
@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_training_within_a_budget(modes, integrator):
    model = reshaped(modes, rank="full")
    policy = tdlrt.ParameterBudget(0.2)
    optimizer = tdlrt.TDLRT(
        model, torch.optim.SGD, lr=0.1, momentum=0.9, rank_policy=policy, integrator=integrator
    )
    x, labels = images(), torch.arange(7) % 5

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]
    assert tdlrt.summary(model).compression >= 0.8
    model[4].check_invariants()


def test_summary_counts_what_the_layer_costs():
    model = reshaped(SPLIT, rank={"4": (2, 3, 3, 2, 2)})
    model[4].path = "three_stage"
    row = tdlrt.summary(model, (5, 2, 4, 3)).rows[1]
    assert row.name == "4"
    assert row.dense_macs == 5 * 20 * 72
    reduce = 72 * 3 + 3 * 4 * 3 * 2 + 3 * 2 * 3 * 2
    assert row.macs == 5 * (reduce + 12 * 6 + 2 * 3 * 5 + 2 * 5 * 4)
    assert row.parameters == 2 * 3 * 3 * 2 * 2 + 4 * 2 + 5 * 3 + 6 * 3 + 4 * 2 + 3 * 2


@pytest.mark.parametrize("modes", [MAP, SPLIT])
def test_a_file_brings_the_modes_along(tmp_path, modes):
    model, path = reshaped(modes), tmp_path / "model.safetensors"
    tdlrt.save(model, path)
    for target in (network(), reshaped(modes, rank=1)):
        tdlrt.load(path, target)
        assert target[4].reshape == modes
        assert torch.equal(target.eval()(images()), model(images()))


def test_a_file_is_not_loaded_into_other_modes(tmp_path):
    path = tmp_path / "model.safetensors"
    tdlrt.save(reshaped(), path)
    others = {
        "is reshaped to": reshaped(SPLIT),
        "to None in the model": reshaped_matrix(),
        "product is 20, expected 21": nn.Sequential(
            *network()[:4], nn.Linear(72, 21), *network()[5:]
        ),
        "for a Conv1d": nn.Sequential(*network()[:4], nn.Conv1d(72, 20, 1), *network()[5:]),
    }
    for message, model in others.items():
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError, match=message):
            tdlrt.load(path, model)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def reshaped_matrix():
    model = network()
    tdlrt.factorize_(model, rank=0.5)
    return model


@pytest.mark.parametrize("modes", [MAP, SPLIT])
def test_autocast_gives_the_type_of_the_dense_layer(modes):
    model, x = reshaped(modes, dtype=torch.float32), images(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert model[:5](x).dtype == tdlrt.to_dense(model)[:5](x).dtype == torch.bfloat16


def test_a_new_start_keeps_modes_and_ranks():
    layer = reshaped(SPLIT)[4]
    ranks, weight = layer.ranks, layer.dense_weight()
    layer.reset_parameters()
    layer.check_invariants()
    assert layer.ranks == ranks
    assert not torch.equal(layer.dense_weight(), weight)


@pytest.mark.parametrize("modes", [MAP, SPLIT])
@pytest.mark.parametrize("format", ["plain", "pt2", "onnx"])
def test_exports_of_every_format(tmp_path, modes, format):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model, path = reshaped(modes, 0.4, torch.float32), tmp_path / "file"
    x = images(torch.float32)
    report = export(model, path, x, format=format)
    assert report.parity < 1e-5
    if format == "plain":
        plain = load_plain(path, network(torch.float32)).eval()
        assert torch.allclose(plain(x), model(x), atol=1e-6)


@pytest.mark.parametrize("modes", [MAP, SPLIT, ((2, 5, 2), (72,))])
def test_plain_layers_for_sequences_are_linear(modes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(72, 20), nn.Linear(20, 5)).double()
    tdlrt.factorize_(model, rank=2, reshape={"0": modes})
    x = gaussian((3, 4, 72), 1)
    plain = tdlrt.to_plain(model, input_size=x.shape)
    assert relative_error(plain(x), model(x)) < 1e-12
    assert {type(one) for one in plain[0].modules()} <= {
        *(nn.Sequential, nn.Linear, nn.Flatten, nn.Unflatten)
    }


sizes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@laws
@given(rows=sizes, columns=sizes, bias=st.booleans(), rank=st.integers(1, 4), seed=seeds)
def test_every_split_is_the_dense_layer(rows, columns, bias, rank, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(math.prod(columns), math.prod(rows), bias, dtype=torch.float64)
    layer = TuckerLinear.from_linear(linear, rank=rank, reshape=(rows, columns))
    dense = layer.to_dense()
    assert relative_error(dense.weight, layer.dense_weight().reshape(dense.weight.shape)) == 0
    model = nn.Sequential(layer)
    for x in (gaussian((3, linear.in_features), seed), gaussian((linear.in_features,), seed)):
        for path in PATHS:
            layer.path = path
            assert relative_error(layer(x), dense(x)) < 1e-12
            if x.ndim == 2:
                assert relative_error(layer.to_plain(path)(x), dense(x)) < 1e-12
    layer.path = "auto"
    plain = tdlrt.to_plain(model)
    weights = [one.numel() for name, one in plain.named_parameters() if not name.endswith("bias")]
    assert sum(weights) == layer.plain_parameters
    ones = linear.out_features if bias and len(rows) > 1 else 0
    assert layer.plain_parameters <= layer.weight_parameters + ones
