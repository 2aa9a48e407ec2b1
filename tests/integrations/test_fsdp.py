"""Processes that share out the dense parameters are one process with all of them."""

import itertools

import pytest

from integrations import shards
from integrations.processes import on_processes
from optim.problems import INTEGRATORS


def assert_close(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@INTEGRATORS
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_two_processes_are_one(integrator, name):
    options = {"integrator": integrator, "name": name}
    alone, ranks = shards.train(None, 1, 50, options)
    changes = sum(before != after for before, after in itertools.pairwise(ranks))
    print(changes)
    for found, of in on_processes(2, shards.train, 2, 50, options):
        assert of == ranks
        assert_close(found, alone)
