"""Two processes with half the batch each are one process with all of it."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import tdlrt
from integrations import replicas
from integrations.processes import on_two_processes
from optim.problems import (
    INTEGRATORS,
    Small,
    assert_same,
    batch,
    network,
    optimizer_for,
    tucker_layers,
)
from tdlrt.integrations import distributed


def assert_close(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@INTEGRATORS
@pytest.mark.parametrize("policy", replicas.POLICIES)
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_two_halves_are_one_batch(integrator, policy, name):
    options = (integrator, policy, name, 50)
    alone, ranks, _ = replicas.train(None, *options)
    first, second = on_two_processes(replicas.train, *options)
    assert_close(first[0], alone, 1e-6)
    assert first[1] == ranks
    assert len({str(step) for step in ranks}) > 2
    assert_same(first, second)


@INTEGRATORS
@pytest.mark.parametrize("policy", replicas.POLICIES)
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_a_shared_out_integrator_is_the_same(integrator, policy, name):
    options = (integrator, policy, name, 12)
    whole, _ = on_two_processes(replicas.train, *options)
    for shared in on_two_processes(replicas.train_sharded, *options):
        assert_same(whole, shared)


@INTEGRATORS
@pytest.mark.parametrize("frozen", [True, False])
def test_the_state_of_layers_of_other_processes_follows_what_is_written(integrator, frozen):
    state, (weights, ranks) = replicas.written(None, integrator, frozen, {})
    found = on_two_processes(replicas.written, integrator, frozen, {"shard_integrator": True})
    for its_state, (its_weights, its_ranks) in found:
        assert_close(its_state, state, 1e-6)
        assert_close(its_weights, weights, 1e-6)
        assert its_ranks == ranks
    assert_same(*found)


def test_each_layer_has_one_process():
    assert sorted(on_two_processes(replicas.computed)) == [["0"], ["3"]]


def test_a_step_that_overflows_on_one_process_changes_nothing_on_any():
    first, second = on_two_processes(replicas.overflow)
    assert sorted([*first[0], *second[0]]) == ["0", "3"]
    assert len(first[0]) == 1
    assert first[2:] == second[2:] == (True, 1)
    texts = sorted([first[1], second[1]])
    assert "would not be finite" in texts[0]
    assert texts[1].startswith("weight: the step would make it NaN")


def test_all_processes_start_from_the_first():
    first, second = on_two_processes(replicas.start)
    assert_same(first, second)


@pytest.mark.parametrize("how", [replicas.nudge, replicas.cut])
def test_a_replica_that_differs_is_named(how):
    message = r"3\.core: differs" if how is replicas.nudge else r"0\.core.*\(6, .*process 1.*\(5, "
    with pytest.raises(tdlrt.IntegratorStateError, match=message):
        on_two_processes(replicas.diverge, how)


def test_gradients_are_accumulated_without_traffic():
    first, second = on_two_processes(replicas.no_sync)
    assert len(first[0]) == 1
    assert not torch.equal(first[1], second[1])
    assert_close(first[2], first[3])
    assert_same(first[2], second[2])


def test_a_branch_that_one_process_left_out_counts_as_zero_there():
    first, second = on_two_processes(replicas.branches, ("a", "b"))
    alone, _ = on_two_processes(replicas.branches, ("a", "a"))
    assert_same(first, second)
    assert {name for name, grad in first.items() if grad is None} == {
        f"branches.c.{name}" for name in ("core", "factors.0", "factors.1", "bias")
    }
    assert first["branches.a.core"].norm() > 0
    assert not torch.equal(alone["branches.a.core"], first["branches.a.core"])


def test_a_process_may_leave_out_all_branches():
    first, second = on_two_processes(replicas.branches, ("a", None))
    assert_same(first, second)


def test_the_norm_of_clipping_is_that_of_the_average():
    first, second = on_two_processes(replicas.clip)
    assert_same(first, second)
    alone = replicas.problem()
    alone.backward()
    assert torch.allclose(first[0], alone.optimizer.clip_grad_norm_(0.01), rtol=1e-12)
    alone.optimizer.step()
    assert_close(first[1], tdlrt.to_dense(alone.model).state_dict())


def test_an_overflow_on_one_process_skips_the_step_on_all():
    assert on_two_processes(replicas.scale) == [(True, 2.0**9)] * 2


def test_one_buffer_of_the_size_of_the_factors_is_sent():
    before, after = on_two_processes(replicas.payload)[0]
    marks = 4 + 3  # parameters: a core and three bases, a core and two
    assert before[0] == [before[1] + marks]
    assert after[0] == [after[1] + marks]
    assert after[1] < before[1]


def test_core_passes_of_bug_send_the_cores_alone():
    for (basis_pass, core_pass), none in on_two_processes(replicas.payload_of_bug):
        assert basis_pass[0] > [sum(basis_pass[1])]
        assert core_pass[0] == [sum(core_pass[1]) + 2]
        assert sum(core_pass[1]) > sum(basis_pass[1])
        assert none == [False, True]


def test_gradients_are_sent_in_another_type():
    for differences in on_two_processes(replicas.reduced):
        assert 1e-6 < max(differences) < 1e-2


@pytest.mark.parametrize("apart", [False, True])
def test_two_trainings_do_not_meet(apart):
    found = on_two_processes(replicas.two_trainings, apart)
    assert [list(of) for of in found] == ([[0], [1]] if apart else [[0, 1]] * 2)
    for number in range(2):
        alone = replicas.problem(seed=number)
        for _ in range(6):
            alone.call()
        for of in found:
            if number in of:
                assert_close(of[number], tdlrt.to_dense(alone.model).state_dict(), 1e-9)


def test_shares_of_other_sizes_weigh_by_their_sizes():
    for found, expected in on_two_processes(replicas.uneven):
        assert_close(found, expected)


@pytest.fixture
def lonely():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_a_group():
    problem = Small()
    with pytest.raises(tdlrt.IntegratorStateError, match="there is no process group; start"):
        distributed.wrap(problem.model, problem.optimizer)
    with pytest.raises(tdlrt.IntegratorStateError, match="there is no process group; start"):
        distributed.check_replicas(problem.model)


def test_a_model_is_prepared_once(lonely):
    problem = Small()
    distributed.prepare(problem.model)
    with pytest.raises(tdlrt.IntegratorStateError, match="was prepared or wrapped before"):
        distributed.wrap(problem.model, problem.optimizer)


def test_an_optimizer_of_another_model(lonely):
    with pytest.raises(tdlrt.IntegratorStateError, match=r"does not hold 0\.core of the model"):
        distributed.wrap(Small().model, Small().optimizer)


@pytest.mark.parametrize("check_every", [0, 1.5])
def test_a_bad_interval(lonely, check_every):
    problem = Small()
    with pytest.raises(ValueError, match=r"check_every: got .*, expected an int of at least 1"):
        distributed.wrap(problem.model, problem.optimizer, check_every=check_every)


def test_a_type_that_is_no_floating_point(lonely):
    problem = Small()
    with pytest.raises(ValueError, match=r"reduce_dtype: got torch\.int32, expected a floating"):
        distributed.wrap(problem.model, problem.optimizer, reduce_dtype=torch.int32)


@pytest.mark.parametrize("whole", [False, True])
def test_a_sharded_model(lonely, whole):
    """All of it, or the dense rest alone."""
    model = Small().model
    mesh = dist.init_device_mesh("cpu", (1,))
    fully_shard(model if whole else model[5], mesh=mesh)
    with pytest.raises(tdlrt.UnsupportedLayerError, match=r"is a DTensor.*fsdp\.fully_shard_"):
        tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1)


def test_join_is_refused(lonely):
    problem = Small()
    model, _ = distributed.wrap(problem.model, problem.optimizer)
    with (
        pytest.raises(tdlrt.IntegratorStateError, match=r"join: .* as many batches"),
        model.join(),
    ):
        model(problem.inputs).sum().backward()


def test_a_layer_that_is_the_whole_model(lonely):
    layer = tdlrt.nn.TuckerLinear(6, 5, rank=4)
    optimizer = tdlrt.TDLRT(layer, torch.optim.SGD, lr=0.1, tau=0.6)
    model, _ = distributed.wrap(layer, optimizer)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    assert layer.ranks < (4, 4)
    model(torch.ones(2, 6)).square().sum().backward()


def test_cores_in_channels_last(lonely):
    model = network().to(memory_format=torch.channels_last)
    assert not tucker_layers(model)[1].core.is_contiguous()
    optimizer = optimizer_for(model, tau=0.4)
    parallel, _ = distributed.wrap(model, optimizer, shard_integrator=True)
    for step in range(2):
        optimizer.zero_grad()
        images, labels = batch(step)
        nn.functional.cross_entropy(parallel(images), labels).backward()
        optimizer.step()
    distributed.check_replicas(model)


def test_a_wrapped_model_is_converted_and_saved(lonely, tmp_path):
    problem = Small()
    model, _ = distributed.wrap(problem.model, problem.optimizer)
    plain = tdlrt.to_plain(model.module)
    assert torch.allclose(plain(problem.inputs), model(problem.inputs), atol=1e-6)
    tdlrt.save(model.module, tmp_path / "model.safetensors")


def test_frozen_layers_are_not_sent(lonely):
    problem = Small()
    problem.layers[1].requires_grad_(False)
    model, _ = distributed.wrap(problem.model, problem.optimizer)
    with replicas.counted() as sizes:
        nn.functional.cross_entropy(model(problem.inputs), problem.labels).backward()
    assert sizes == [problem.layers[0].weight_parameters + 4]
