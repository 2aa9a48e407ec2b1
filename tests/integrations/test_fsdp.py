"""Processes that share out the dense parameters are one process with all of them."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import tdlrt
from integrations import shards
from integrations.processes import on_processes, on_two_processes
from optim.problems import INTEGRATORS, assert_same
from tdlrt.integrations import fsdp, fsdp_checkpoints


def assert_close(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@INTEGRATORS
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_two_processes_are_one(integrator, name):
    options = {"integrator": integrator, "name": name}
    alone, ranks = shards.train(None, 1, 40, options)
    changes = [
        before != after
        for of in zip(*ranks, strict=True)  # the ranks of a layer after each step
        for before, after in itertools.pairwise(of)
    ]
    assert sum(changes) >= 20
    for found, of in on_two_processes(shards.train, 2, 40, options):
        assert of == ranks
        assert_close(found, alone)


@INTEGRATORS
def test_a_training_continues_on_another_number_of_processes(tmp_path, integrator):
    options = {"integrator": integrator}
    expected, ranks = shards.train(None, 1, 16, options)
    (found, _), _ = on_two_processes(shards.save, 2, 8, tmp_path / "two", options)
    assert_close(found, expected)
    for again, _ in on_two_processes(shards.resume, 2, 8, tmp_path / "two", options):
        assert_same(again, found)
    others = [
        shards.resume(None, 1, 8, tmp_path / "two", options),
        *on_processes(3, shards.resume, 3, 8, tmp_path / "two", options),
    ]
    shards.save(None, 1, 8, tmp_path / "one", options)
    others += on_two_processes(shards.resume, 2, 8, tmp_path / "one", options)
    for found, of in others:
        assert of == ranks[8:]
        assert_close(found, expected)


def test_a_training_in_bfloat16_continues_bit_for_bit(tmp_path):
    options = {"dtype": torch.bfloat16}
    saved = on_two_processes(shards.save, 2, 4, tmp_path / "two", options)
    resumed = on_two_processes(shards.resume, 2, 4, tmp_path / "two", options)
    for (found, ranks), (again, of) in zip(saved, resumed, strict=True):
        assert found["4.weight"].dtype == torch.bfloat16
        assert of == ranks[4:]
        assert_same(again, found)


def test_the_norm_of_clipping_is_that_of_the_whole():
    alone, expected = shards.clip(None, 1)
    for norm, gradients in on_two_processes(shards.clip, 2):
        assert torch.allclose(norm, alone, rtol=1e-12)
        for gradient, of in zip(gradients, expected, strict=True):
            assert torch.allclose(gradient, of, rtol=1e-9, atol=1e-14)


def test_a_part_that_is_not_finite_stops_all():
    for found in [shards.overflow(None, 1), *on_two_processes(shards.overflow, 2)]:
        unchanged, texts, skipped = found
        assert unchanged == [False, True, True]
        assert skipped == 1
        assert len(texts) == 1
        assert texts[0].startswith("5.0.weight: its gradient has NaN")


def test_all_processes_start_from_the_first():
    first, second = on_two_processes(shards.start, 2)
    assert_same(first, second)
    assert_same(first, shards.weights(shards.network()))


def test_gradients_are_sent_in_another_type():
    for rounded, exact in on_two_processes(shards.reduced, 2):
        for one, other in zip(rounded, exact, strict=True):
            assert 1e-6 < (one - other).norm() / other.norm() < 1e-2


@pytest.fixture
def lonely():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def optimizer_of(model):
    return tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1)


def test_a_model_that_torch_has_sharded(lonely):
    model = shards.network()
    fully_shard(model[5])
    with pytest.raises(tdlrt.UnsupportedLayerError, match=r"is a DTensor.*fsdp\.fully_shard_\("):
        optimizer_of(model)
    with pytest.raises(tdlrt.UnsupportedLayerError, match=r"is a DTensor.* as units"):
        fsdp.fully_shard_(model)


def test_a_tucker_layer_that_torch_has_sharded(lonely):
    with pytest.raises(tdlrt.UnsupportedLayerError, match=r"0\.core: is a DTensor"):
        optimizer_of(fully_shard(shards.network()))


def test_a_module_that_is_not_sharded_beside_one_that_is(lonely):
    model = nn.ModuleList([fsdp.fully_shard_(shards.network()), nn.Linear(2, 2)])
    with pytest.raises(tdlrt.UnsupportedLayerError, match=r"1\.weight: is a plain .* as 0\."):
        optimizer_of(model)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (tdlrt.UnsupportedLayerError, "units: got Linear in place 0", {"units": [nn.Linear(2, 2)]}),
        (
            tdlrt.SetupError,
            "mp_policy: got param_dtype=torch.bfloat16 for Tucker layers",
            {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
        ),
        (tdlrt.SetupError, "ignored_params: got some, expected none", {"ignored_params": set()}),
        (ValueError, "check_every: got 0", {"check_every": 0}),
        (ValueError, "reduce_dtype: got torch.int64", {"reduce_dtype": torch.int64}),
    ],
)
def test_what_is_refused_changes_nothing(lonely, error, message, arguments):
    model = shards.network()
    with pytest.raises(error, match=message):
        fsdp.fully_shard_(model, **arguments)
    assert type(model) is nn.Sequential


def test_a_mesh_of_two_dimensions(lonely):
    mesh = dist.init_device_mesh("cpu", (1, 1))
    with pytest.raises(tdlrt.SetupError, match="mesh: got one of 2 dimensions, expected one"):
        fsdp.fully_shard_(shards.network(), mesh=mesh)


def test_a_model_without_values(lonely):
    with torch.device("meta"):
        model = nn.Sequential(tdlrt.nn.TuckerLinear(6, 5, rank=4))
    with pytest.raises(tdlrt.UnsupportedLayerError, match=r"0\.core: is on the meta device"):
        fsdp.fully_shard_(model)


def test_without_a_group():
    with pytest.raises(tdlrt.IntegratorStateError, match="there is no process group"):
        fsdp.fully_shard_(shards.network())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    on_two_processes(shards.save, 2, 2, folder, {})
    return folder


def refused(folder, message, model=None):
    """A checkpoint that cannot be loaded leaves everything as it was."""
    training = shards.Training().steps(1)
    if model is not None:
        training.model = model
        training.optimizer = optimizer_of(model)
    before = {n: v.clone() for n, v in training.model.state_dict().items()}
    state = json.dumps(training.optimizer.state_dict(), default=lambda tensor: tensor.tolist())
    with pytest.raises(tdlrt.TdlrtError, match=message):
        fsdp_checkpoints.load(training.model, training.optimizer, folder)
    assert_same(training.model.state_dict(), before)
    after = json.dumps(training.optimizer.state_dict(), default=lambda tensor: tensor.tolist())
    assert after == state


@pytest.mark.parametrize("number", [0, 1])
def test_a_checkpoint_without_one_of_its_files(checkpoint, tmp_path, number):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    sorted(folder.iterdir())[number].unlink()
    refused(folder, "of the .* entries of|is in the model only|has shape|has no tensor")


def test_a_checkpoint_with_a_damaged_file(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    first = min(folder.iterdir())
    first.write_bytes(first.read_bytes()[:40])
    refused(folder, "cannot be read")


def test_no_checkpoint(tmp_path):
    refused(tmp_path, "has no tensor 'optimizer', expected a folder that")
    refused(tmp_path / "none", "cannot be read")


def test_a_checkpoint_of_another_network(checkpoint):
    other = shards.network()
    other[5][2] = nn.Linear(7, 5).double()
    refused(checkpoint, r"5\.2\.(bias|weight) has shape", other)
    refused(checkpoint, "is in the checkpoint only", other[:5])


def test_a_state_of_another_optimizer_leaves_the_model(checkpoint):
    refused(checkpoint, "state_dict: got one of AdamW, expected one of SGD", shards.network())


def test_a_folder_that_exists(checkpoint):
    training = shards.Training()
    with pytest.raises(tdlrt.CheckpointError, match="exists, expected a new folder"):
        fsdp_checkpoints.save(training.model, training.optimizer, checkpoint)


def test_no_pickle_is_written(checkpoint):
    assert {Path(file).suffix for file in checkpoint.iterdir()} == {".safetensors"}
