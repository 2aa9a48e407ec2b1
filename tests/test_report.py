"""summary(): parameters, compression and multiply-adds."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tdlrt
from tdlrt.paths import PATHS


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, (3, 1), stride=2, padding=(2, 0), padding_mode="reflect"),
        nn.ConvTranspose2d(32, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 10 * 16, 40),
        nn.Linear(40, 10),
    )


def test_parameters_and_compression_by_hand():
    model = network()
    tdlrt.factorize_(model, rank={"0": (8, 3, 3, 3), "5": 10})
    report = tdlrt.summary(model)
    conv = 8 * 3 * 3 * 3 + 16 * 8 + 3 * 3 + 3 * 3 + 3 * 3
    linear = 10 * 10 + 40 * 10 + 640 * 10
    assert report.parameters == conv + linear
    assert report.dense_parameters == 16 * 27 + 40 * 640
    assert report.compression == 1 - report.parameters / report.dense_parameters
    assert report.network_parameters == sum(p.numel() for p in model.parameters())
    assert report.network_dense_parameters == sum(p.numel() for p in network().parameters())
    assert 0 < report.network_compression < report.compression
    assert report.ranks == {"0": (8, 3, 3, 3), "5": (10, 10)}
    assert [row.name for row in report.rows] == ["0", "2", "3", "5", "6"]
    assert report.macs is None


def test_identities_of_unfactorised_modes_do_not_count():
    layer = tdlrt.nn.TuckerConv2d(16, 16, 3, rank=4, modes="channels")
    report = tdlrt.summary(nn.Sequential(layer))
    assert report.parameters == 4 * 4 * 9 + 16 * 4 + 16 * 4
    assert report.network_parameters == report.parameters + 16


@pytest.mark.parametrize("rank", [0.1, 0.4, 0.9, "full", {"2": (8, 5, 1, 1), "5": 4}])
def test_the_size_as_plain_layers_is_that_of_to_plain(rank):
    model = network()
    tdlrt.factorize_(model, rank=rank)
    report = tdlrt.summary(model)
    plain = sum(parameter.numel() for parameter in tdlrt.to_plain(model).parameters())
    assert report.network_parameters - report.parameters + report.plain_parameters == plain
    assert f"as plain torch layers: {report.plain_parameters:,}" in str(report)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rank", [0.3, "full"])
def test_macs_are_half_the_flops_that_torch_counts(rank, path):
    model = network().eval()
    inputs = torch.randn(2, 3, 8, 16)

    def flops(module):
        with FlopCounterMode(display=False) as counter:
            module(inputs)
        return counter.get_total_flops()

    dense_flops = flops(model)
    tdlrt.factorize_(model, rank=rank)
    for layer in model:
        if isinstance(layer, tdlrt.nn.TuckerLayer):
            layer.path = path
    report = tdlrt.summary(model, (2, 3, 8, 16))
    assert report.macs == flops(tdlrt.to_plain(model)) // 2
    assert report.dense_macs == dense_flops // 2
    assert [row.path for row in report.rows] == [path, path, None, path, None]


def test_macs_are_those_of_the_path_that_inference_takes():
    model = nn.Sequential(tdlrt.nn.TuckerConv2d(64, 64, 3, rank=8, padding=1))
    macs = {}
    for path in (*PATHS, "auto"):
        model[0].path = path
        (row,) = tdlrt.summary(model, (4, 64, 16, 16)).rows
        macs[row.path] = row.macs
    assert row.path == "three_stage"
    assert macs["three_stage"] == 4 * 256 * (64 * 8 + 8 * 8 * 9 + 8 * 64)
    assert macs["dense"] == row.dense_macs == 4 * 256 * 64 * 64 * 9
    assert tdlrt.summary(model).rows[0].path is None


def test_the_model_is_left_as_it_was():
    model = network()
    model[1].eval()
    statistics = model[1].running_mean.clone()
    tdlrt.summary(model, (2, 3, 8, 16))
    assert [module.training for module in model] == [True, False, *[True] * 5]
    assert torch.equal(model[1].running_mean, statistics)
    assert not any(module._forward_hooks for module in model.modules())


def test_it_prints_as_a_table():
    model = network()
    tdlrt.factorize_(model, rank=0.5)
    text = str(tdlrt.summary(model, (1, 3, 8, 16)))
    assert "16x3x3x3" in text
    assert "Tucker layers:" in text
    assert max(map(len, text.splitlines())) <= 80


def test_metrics_are_flat_floats():
    model = network()
    tdlrt.factorize_(model, rank={"0": (8, 3, 3, 3), "5": 10})
    scalars = tdlrt.metrics(model)
    report = tdlrt.summary(model)
    assert scalars == {
        **{f"tdlrt/rank/0/{mode}": rank for mode, rank in enumerate((8, 3, 3, 3))},
        **{f"tdlrt/rank/5/{mode}": 10 for mode in range(2)},
        "tdlrt/parameters": report.parameters,
        "tdlrt/compression": report.compression,
    }
    assert {type(value) for value in scalars.values()} == {float}


def test_dense_and_empty_models():
    report = tdlrt.summary(network(), (1, 3, 8, 16))
    assert report.compression == report.network_compression == 0
    assert report.macs == report.dense_macs > 0
    assert tdlrt.summary(nn.ReLU()).network_compression == 0
