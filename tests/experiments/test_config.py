import math

import pytest
import torch

from tdlrt.errors import RankError, UnknownNameError
from tdlrt.experiments.config import ConfigError, RunConfig


def config(**options):
    return RunConfig(**{"model": "lenet5", "data": "digits", **options})


def test_defaults_depend_on_data_and_method():
    assert (config().epochs, config().batch_size, config().lr) == (20, 32, 0.05)
    dense = config(data="mnist", method="dense")
    assert (dense.epochs, dense.batch_size, dense.lr) == (5, 128, 0.02)
    assert (config(epochs=3, lr=1.0).epochs, config(lr=1.0).lr) == (3, 1.0)


@pytest.mark.parametrize(
    ("option", "near"), [("model", "lenet5"), ("data", "digits"), ("method", "tdlrt")]
)
def test_unknown_names(option, near):
    with pytest.raises(UnknownNameError, match=rf"unknown .*; did you mean {near}.* Known: "):
        config(**{option: near[:-1]})


def test_unknown_integrator():
    with pytest.raises(UnknownNameError, match=r"integrator 'bugs'; did you mean bug\?"):
        config(integrator="bugs")


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("tau", 1.0, RankError),
        ("tau", -0.1, RankError),
        ("tau", math.nan, RankError),
        ("rank", 0, RankError),
        ("rank", 0.0, RankError),
        ("rank", 1.5, RankError),
        ("rank", "half", RankError),
        ("init_scale", 0.0, ConfigError),
        ("adapt_every", 0, ConfigError),
        ("core_steps", 0, ConfigError),
        ("freeze_at", 1.1, ConfigError),
        ("epochs", 0, ConfigError),
        ("batch_size", 0, ConfigError),
        ("lr", 0.0, ConfigError),
        ("lr", math.inf, ConfigError),
        ("momentum", 1.0, ConfigError),
        ("weight_decay", -1e-4, ConfigError),
        ("seed", -1, ConfigError),
    ],
)
def test_values_out_of_range(option, value, error):
    with pytest.raises(error, match=rf"^{option} {value!r}: expected "):
        config(**{option: value})


@pytest.mark.parametrize(
    "options", [{"rank": 1}, {"rank": 1.0}, {"rank": "full"}, {"tau": 0.0}, {"freeze_at": 1.0}]
)
def test_values_at_the_edge_of_their_range(options):
    config(**options)


@pytest.mark.parametrize("device", ["tpu7", "cuda:99"])
def test_device_that_is_not_there(device):
    with pytest.raises(ConfigError, match=f"device '{device}': not available"):
        config(device=device)


def test_device():
    assert config(device="cpu").torch_device() == torch.device("cpu")
    assert config().torch_device().type in ("cpu", "cuda")


def test_differences_ignore_where_the_data_lie():
    stored = config(data_dir="here", seed=1).to_dict()
    assert config(data_dir="there", seed=1).differences(stored) == []
    assert config(seed=2, tau=0.2).differences(stored) == ["tau", "seed"]
