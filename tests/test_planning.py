"""The contraction planner: what it counts, what it chooses, where its constants come from."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tdlrt
from tdlrt.paths import (
    PATHS,
    LayerShape,
    choose_path,
    conv_shape,
    dense_cost,
    linear_shape,
    path_cost,
    path_macs,
    path_parameters,
)
from tdlrt.paths.apply import conv_stages, linear_stages
from tdlrt.paths.choose import cached_path
from tdlrt.paths.cost import RATES, stage_features
from tdlrt.paths.stages import path_stages

CALIBRATION = Path(__file__).parent.parent / "benchmarks/results/planner_calibration.json"
PURPOSES = ("training", "inference", "plain")


def vgg(channels, size, rank, batch=64, layout="channels_last"):
    """A 3x3 convolution of VGG16 with the same rank in both channel modes."""
    return conv_shape(
        (channels, channels, 3, 3),
        (rank, rank, 3, 3),
        (batch, channels, size, size),
        padding=1,
        channels_last=layout == "channels_last",
    )


def test_the_constants_are_those_of_the_result_file():
    stored = json.loads(CALIBRATION.read_text(encoding="utf-8"))["rates"]
    assert {name: rates._asdict() for name, rates in RATES.items()} == stored


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize(("channels", "size"), [(64, 32), (128, 16), (256, 8), (512, 4)])
def test_low_ranks_are_applied_in_three_stages(channels, size, purpose, layout):
    assert (
        choose_path([vgg(channels, size, channels // 10, layout=layout)], purpose) == "three_stage"
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize(("channels", "size"), [(64, 32), (128, 16)])
def test_full_rank_is_applied_dense(channels, size, purpose, layout):
    assert choose_path([vgg(channels, size, channels, layout=layout)], purpose) == "dense"


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_single_input_channel_is_folded_in(purpose):
    shape = conv_shape((128, 1, 7, 7), (8, 1, 7, 7), (64, 1, 28, 28), input_grad=False)
    assert choose_path([shape], purpose) == "fold_in"


def test_small_batches_are_not_worth_a_reconstruction():
    assert choose_path([linear_shape((500, 500), (500, 500), (2, 500))], "inference") != "dense"
    assert choose_path([linear_shape((500, 500), (500, 500), (10**5, 500))], "inference") == "dense"


def test_the_choice_is_the_cheapest_and_dense_where_little_is_to_be_won():
    for channels, size, rank, purpose in [(64, 8, 20, "training"), (256, 2, 200, "inference")]:
        shape = vgg(channels, size, rank)
        costs = {path: path_cost(path, shape, purpose) for path in PATHS}
        assert costs[choose_path([shape], purpose)] == min(costs.values()) < 0.85 * costs["dense"]
        assert cached_path((shape,), purpose) == choose_path([shape], purpose)
        assert (
            costs["dense"] > dense_cost(shape, purpose) == path_cost_without_folds(shape, purpose)
        )

    for rank in range(1, 65):
        shape = vgg(64, 32, rank)
        costs = {path: path_cost(path, shape, "training") for path in PATHS}
        won = min(costs.values()) < 0.85 * costs["dense"]
        assert (choose_path([shape], "training") != "dense") == won


def path_cost_without_folds(shape, purpose):
    """Of dense with identities of no cost: full ranks, and what folding takes subtracted."""
    rates = [RATES["spatial, forward"], RATES["fold, forward"]]
    backward = [RATES["spatial, backward"], RATES["fold, backward"]]
    folds, _ = path_stages("dense", shape)
    total = path_cost("dense", shape, purpose)
    for stage in folds:
        row = 0 if stage.kind == "spatial" else 1
        for passes, table in ((1, rates), (2, backward)):
            if table is rates or purpose == "training":
                total -= passes * sum(
                    map(math.prod, zip(table[row], stage_features(stage), strict=True))
                )
    return pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_the_multiply_adds_are_half_the_flops_that_torch_counts(path):
    options = {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)}
    layer = tdlrt.nn.TuckerConv2d(6, 9, (3, 2), rank=(5, 4, 2, 2), bias=False, **options)
    input = (3, 6, 11, 10)
    shape = conv_shape(layer.shape, layer.ranks, input, **options)
    output = layer(torch.zeros(input))
    assert shape.rows_out == output.numel() // 9
    plain = layer.to_plain(path)
    with FlopCounterMode(display=False) as counter:
        plain(torch.zeros(input))
    assert path_macs(path, shape) == counter.get_total_flops() // 2
    assert path_parameters(path, shape) == sum(one.numel() for one in plain.parameters())
    folds, _ = path_stages(path, shape)
    reduce, _, expand = conv_stages(layer.core, list(layer.factors), path)
    assert (reduce is None, expand is None) == (
        path in ("fold_in", "dense"),
        path in ("fold_out", "dense"),
    )
    assert len(folds) == {"three_stage": 1, "dense": 3}.get(path, 2)


@pytest.mark.parametrize("path", PATHS)
def test_the_stages_of_a_linear_layer_are_its_products(path):
    layer = tdlrt.nn.TuckerLinear(7, 9, rank=4)
    matrices = [stage.matrix for stage in linear_stages(layer.core, list(layer.factors), path)]
    _, passes = path_stages(path, linear_shape(layer.shape, layer.ranks, (2, 3, 7)))
    assert [(stage.outputs, stage.inputs) for stage in passes] == [m.shape for m in matrices]
    assert {stage.rows_in for stage in passes} == {6}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"padding": "same", "dilation": 3}, 7 * 6),
        ({"padding": "valid"}, 5 * 4),
        ({"padding": 1, "stride": 2}, 4 * 3),
        ({"padding": (0, 1), "stride": (1, 3), "dilation": (2, 1)}, 3 * 2),
    ],
)
def test_positions_of_the_output(options, expected):
    for input, images in (((2, 4, 7, 6), 2), ((4, 7, 6), 1)):
        shape = conv_shape((5, 4, 3, 3), (2, 2, 3, 3), input, **options)
        assert (shape.rows_in, shape.rows_out) == (images * 7 * 6, images * expected)
        layer = tdlrt.nn.TuckerConv2d(4, 5, 3, rank=2, **options)
        assert layer(torch.zeros(input)).numel() == 5 * images * expected


def test_the_first_layer_of_a_network_costs_less_to_train():
    shape = vgg(64, 32, 20)
    first = shape._replace(input_grad=False)
    for path in PATHS:
        assert path_cost(path, first, "training") < path_cost(path, shape, "training")
        assert path_cost(path, first, "inference") == path_cost(path, shape, "inference")


def test_a_layer_plans_anew_for_another_shape_and_another_rank():
    layer = tdlrt.nn.TuckerLinear(500, 500, rank="full")

    def planned(rows):
        return layer.planned_path(layer.plan_shape((rows, 500)), "inference")

    assert planned(10**5) == "dense" != planned(2)
    small = tdlrt.nn.TuckerLinear(500, 500, rank=5)
    layer.load_state_dict(small.state_dict())
    assert planned(10**5) != "dense"


@pytest.mark.parametrize("purpose", PURPOSES)
def test_by_size_the_fewest_parameters_are_chosen_and_then_the_least_time(purpose):
    for weight, rank in [((64, 3), 2), ((30, 60), 12), ((30, 60), 29)]:
        shape = linear_shape(weight, (rank, rank), (100, weight[1]))
        sizes = {path: path_parameters(path, shape) for path in PATHS}
        costs = {path: path_cost(path, shape, purpose) for path in PATHS}
        chosen = choose_path([shape], purpose, "size")
        smallest = [path for path in PATHS if sizes[path] == min(sizes.values())]
        assert chosen in smallest
        assert costs[chosen] == min(costs[path] for path in smallest)


def test_all_calls_of_a_layer_count():
    few, many = (linear_shape((500, 500), (200, 200), (rows, 500)) for rows in (1, 10**4))
    assert choose_path([few], "plain") == "dense" != choose_path([many], "plain")
    assert choose_path([few, many], "plain") == choose_path([many], "plain")
    assert choose_path([few] * 3, "plain") == "dense"


def test_shapes_are_hashable_and_an_empty_batch_has_a_plan():
    assert len({LayerShape((2, 2), (1, 1), 1, 1), LayerShape((2, 2), (1, 1), 1, 1)}) == 1
    for layer, input in (
        (tdlrt.nn.TuckerLinear(8, 6), (0, 8)),
        (tdlrt.nn.TuckerConv2d(8, 6, 3), (0, 8, 5, 5)),
    ):
        assert layer(torch.zeros(input)).shape[0] == 0


def test_plain_layers_are_planned_for_many_positions():
    layer = tdlrt.nn.TuckerConv2d(64, 64, 3, rank=6)
    assert len(layer.to_plain()) == 3
    assert isinstance(tdlrt.nn.TuckerConv2d(64, 64, 3, rank="full").to_plain(), nn.Conv2d)
    assert len(tdlrt.nn.TuckerConv2d(1, 64, 5, rank=8).to_plain()) == 2
    assert len(tdlrt.nn.TuckerLinear(64, 64, rank=6).to_plain()) == 2
    assert isinstance(tdlrt.nn.TuckerLinear(64, 64, rank=60).to_plain(), nn.Linear)
