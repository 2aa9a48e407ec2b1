import math

import pytest
import torch

from tdlrt.errors import ConfigError, RankError, UnknownNameError
from tdlrt_lab.config import RunConfig


def config(**options):
    return RunConfig(**{"model": "lenet5", "data": "digits", **options})


def test_defaults_depend_on_data_and_method():
    assert (config().epochs, config().batch_size, config().lr) == (20, 32, 0.05)
    dense = config(data="mnist", method="dense")
    assert (dense.epochs, dense.batch_size, dense.lr) == (5, 128, 0.02)
    assert (config(epochs=3, lr=1.0).epochs, config(lr=1.0).lr) == (3, 1.0)
    assert config(method="tucker").lr == 0.02
    assert config(optimizer="adamw").lr == config(method="tucker", optimizer="adam").lr == 0.006
    assert config(method="dense", optimizer="adamw").lr == 0.001


def test_tolerance_gives_way_to_a_budget():
    assert (config().tau, config().budget) == (0.1, None)
    assert (config(budget=0.05).tau, config(budget=0.05).budget) == (None, 0.05)
    recipe = ("optimizer", "lr", "ramp", "spare", "adapt_every", "freeze_at")
    found = [getattr(config(budget=0.05), name) for name in recipe]
    assert found == ["adam", 0.006, "linear", 0.25, 10, 0.5]
    assert [getattr(config(), name) for name in recipe] == ["sgd", 0.05, "constant", 0.0, 1, 0.5]
    assert config(budget=0.05, spare=0.0, adapt_every=1).spare == 0.0
    with pytest.raises(ConfigError, match=r"tau 0\.1 and budget 0\.05: expected one of them"):
        config(tau=0.1, budget=0.05)


def test_a_penalty_on_cores_needs_orthonormal_bases():
    assert config(spectral_penalty=0.1).spectral_penalty == 0.1
    with pytest.raises(ConfigError, match=r"spectral_penalty 0\.1: expected 0 for method 'tucker'"):
        config(method="tucker", spectral_penalty=0.1)


@pytest.mark.parametrize(
    ("option", "near"), [("model", "lenet5"), ("data", "digits"), ("method", "tdlrt")]
)
def test_unknown_names(option, near):
    with pytest.raises(UnknownNameError, match=rf"unknown .*; did you mean {near}.* Known: "):
        config(**{option: near[:-1]})


@pytest.mark.parametrize(
    ("option", "word", "near"),
    [
        ("integrator", "bugs", "bug"),
        ("ramp", "cube", "cubic"),
        ("modes", "channel", "channels"),
        ("optimizer", "Adam", "adam"),
        ("augment", "standart", "standard"),
        ("precision", "bf16", "bfloat16"),
    ],
)
def test_unknown_words(option, word, near):
    with pytest.raises(UnknownNameError, match=rf"unknown {option} '{word}'; did you mean {near}"):
        config(**{option: word})


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
        ("reshape", "fc1=500", ConfigError),
        ("reshape", "fc1=500:50x4x", ConfigError),
        ("reshape", "500:50x4x4", ConfigError),
        ("reshape", "fc1=500:800,fc1=500:800", ConfigError),
        ("budget", 0.0, RankError),
        ("budget", 1.1, RankError),
        ("budget_start", 0.0, RankError),
        ("budget_start", 1.1, RankError),
        ("spare", -0.1, RankError),
        ("train_images", 0, ConfigError),
        ("warmup", 1.0, ConfigError),
        ("validation", 0, ConfigError),
        ("validation", "half", ConfigError),
        ("validation", 1.0, ConfigError),
        ("dense_until", 1.0, ConfigError),
        ("dense_until", 0.0, ConfigError),
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
        ("spectral_penalty", -0.1, ConfigError),
        ("seed", -1, ConfigError),
    ],
)
def test_values_out_of_range(option, value, error):
    with pytest.raises(error, match=rf"^{option} {value!r}: expected "):
        config(**{option: value})


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1},
        {"rank": 1.0},
        {"rank": "full"},
        {"rank": {"conv*": (1, 1, 1, 1)}},
        {"tau": 0.0},
        {"budget": 1.0},
        {"freeze_at": 1.0},
        {"warmup": 0.0},
        {"train_images": 1},
    ],
)
def test_values_at_the_edge_of_their_range(options):
    config(**options)


def test_a_budget_starts_somewhere_only_if_there_is_one():
    assert config(budget=0.05, budget_start=0.2).budget_start == 0.2
    with pytest.raises(
        ConfigError, match=r"budget_start 0.2: not used with budget none, only with budget given"
    ):
        config(budget_start=0.2)


def test_only_image_folders_are_resized():
    assert config(data="imagefolder", image_size=32).image_size == 32
    with pytest.raises(
        ConfigError, match=r"image_size 32: not used with data digits, only with .*folder"
    ):
        config(image_size=32)


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


def test_options_newer_than_a_stored_run_had_their_defaults_there():
    stored = config().to_dict()
    for name in ("validation", "augment", "dense_until", "image_size"):
        del stored[name]
    assert config().differences(stored) == []
    assert config(augment="standard", validation=0.1).differences(stored) == [
        "validation",
        "augment",
    ]
