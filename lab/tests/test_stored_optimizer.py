"""A checkpoint of which one value is another: refused when it is loaded, or trained on from."""

import math

import pytest
import torch

from tdlrt.errors import NonFiniteError, RunError
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import load_data
from tdlrt_lab.run.checkpoint import load_checkpoint, save_checkpoint
from tdlrt_lab.run.training import Training

ODD = (None, True, -1, 2**80, 0.5, math.nan, "a", [], {}, torch.zeros(3), torch.tensor(math.nan))
RUNS = [
    {"method": "dense", "warmup": 0.2},
    {"method": "dense", "optimizer": "adam"},
    {"method": "tdlrt", "optimizer": "adamw", "rank": 0.1},
]


def train(training, steps):
    epochs = training.epochs(lambda: training.step >= steps, lambda _: None)
    next(epochs, None)


@pytest.fixture(scope="module")
def data():
    return load_data("digits", train_images=64)


@pytest.mark.parametrize("options", RUNS)
def test_one_value_of_another_kind(tmp_path, script, data, options):
    kinds = script("kinds")
    config = RunConfig(model="lenet5", data="digits", epochs=2, batch_size=16, **options)
    training = Training(config, data)
    train(training, 3)
    save_checkpoint(training, tmp_path / "last.pt")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    parts = {name: value for name, value in state.items() if name not in ("model", "format")}
    parts["optimizer"]["state"] = dict(list(parts["optimizer"]["state"].items())[:2])
    refused = taken = 0
    for path in kinds.fields(parts):
        for value in ((), *((odd,) for odd in ODD)):
            torch.save(kinds.changed(state, path, *value), tmp_path / "last.pt")
            try:
                load_checkpoint(training, tmp_path / "last.pt")
            except RunError as error:
                assert str(error).startswith(f"{tmp_path / 'last.pt'}: ")
                refused += 1
                continue
            taken += 1
            try:
                train(training, 5)
            except NonFiniteError:
                pass
            except Exception as error:
                raise AssertionError(f"{path} as {value}: {error!r}") from error
            training = Training(config, data)
    assert refused > 5 * taken


NAMED = {
    "rate": (("optimizer", "param_groups", 0, "lr"), "a", "param_groups: 0: lr: 'a'; expected a n"),
    "betas": (("optimizer", "param_groups", 0, "betas"), [1, 0.9], r"betas: \[1, 0\.9\]; expected"),
    "moment": (("optimizer", "state", 0, "exp_avg"), 3, "exp_avg: got 3, expected a tensor of"),
    "no step": (("optimizer", "state", 1), {"step": torch.ones(())}, "has no exp_avg, which other"),
    "cosine": (("schedule", "T_max"), 0, "schedule: T_max: 0; expected 8, as the run has"),
    "position": (("schedule", "last_epoch"), 7, "schedule: last_epoch: 7; expected 3"),
    "seen": (("seen",), "a", "seen 'a': expected an integer from 0"),
}


@pytest.mark.parametrize(("path", "value", "message"), NAMED.values(), ids=NAMED)
def test_the_error_names_the_key(tmp_path, script, data, path, value, message):
    config = RunConfig(
        **{"model": "lenet5", "data": "digits", "epochs": 2, "batch_size": 16},
        **{"method": "dense", "optimizer": "adam"},
    )
    training = Training(config, data)
    train(training, 3)
    save_checkpoint(training, tmp_path / "last.pt")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(script("kinds").changed(state, path, value), tmp_path / "last.pt")
    with pytest.raises(RunError, match=rf"last\.pt: does not fit .*{message}"):
        load_checkpoint(training, tmp_path / "last.pt")
