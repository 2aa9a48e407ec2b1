"""benchmarks/first_epochs.py: networks learn from the first epoch on with the defaults."""

import json

import pytest


@pytest.fixture
def first_epochs(script):
    return script("first_epochs")


def test_what_passes(first_epochs):
    dense = [50.0, 80.0, 90.0, 91.0, 92.0, 93.0]
    assert first_epochs.passes([10.0, 20.0, 75.0, 80.0, 85.0, 90.0], dense)
    assert not first_epochs.passes([10.0, 20.0, 74.9, 80.0, 85.0, 95.0], dense)
    assert not first_epochs.passes([10.0, 20.0, 95.0, 95.0, 95.0, 89.9], dense)


def test_the_recorded_networks_pass_with_the_default(first_epochs):
    rows = json.loads(first_epochs.RESULT.read_text("utf-8"))["rows"]
    found = {
        (row["network"], row["optimizer"], row["seed"], row["start"]): row["accuracies"]
        for row in rows
    }
    for network in first_epochs.CHECKED:
        for optimizer in first_epochs.OPTIMIZERS:
            dense = found[network, optimizer, 0, "dense"]
            assert first_epochs.passes(found[network, optimizer, 0, "default"], dense)


def test_lenet5_learns_in_two_epochs(first_epochs):
    """A start at 0.3 of the norm is at chance then."""
    data = first_epochs.digits()
    assert first_epochs.train("LeNet-5", "SGD", 0, data, {}, epochs=2)[-1] > 60


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("number", range(8))  # the last takes too long
def test_every_network_learns_as_fast_as_dense(first_epochs, optimizer, number):
    network, data = first_epochs.CHECKED[number], first_epochs.digits()
    dense = first_epochs.train(network, optimizer, 0, data)
    assert first_epochs.passes(first_epochs.train(network, optimizer, 0, data, {}), dense)
