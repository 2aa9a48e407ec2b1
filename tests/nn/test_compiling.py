"""`torch.compile` of a model whose ranks change: one graph, and the same training as without it."""

import itertools
import shutil

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import tdlrt
from tdlrt.nn import TuckerLayer, mark_dynamic_ranks_


def training(steps=45):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 48),
        nn.ReLU(),
        nn.Linear(48, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )
    tdlrt.factorize_(model, rank=0.8, init_scale=0.3)
    tolerance = tdlrt.RelativeTolerance(tdlrt.LinearSchedule(0.0, 0.5, 40), min_rank=2)
    options = {"rank_policy": tolerance, "adapt_every": 1, "freeze_after": steps - 4}
    return model, tdlrt.TDLRT(model, torch.optim.SGD, lr=0.05, momentum=0.9, **options)


def run(called, optimizer, model, steps=45):
    """Losses, and the number of changes of the ranks of a layer."""
    x, y = torch.randn(32, 3, 6, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 10
    losses, ranks = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(called(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        ranks.append([m.ranks for m in model.modules() if isinstance(m, TuckerLayer)])
    pairs = [pair for of in zip(*ranks, strict=True) for pair in itertools.pairwise(of)]
    return torch.tensor(losses), sum(before != after for before, after in pairs)


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # inductor
@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_one_graph_serves_all_ranks(backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    model, optimizer = training()
    expected, _ = run(model, optimizer, model)
    model, optimizer = training()
    mark_dynamic_ranks_(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        losses, changes = run(compiled, optimizer, model)
    assert changes >= 30
    assert optimizer.ranks_frozen
    assert counter.frame_count <= (8 if backend == "inductor" else 1)
    assert torch.allclose(losses, expected, rtol=1e-4)


def test_without_marks_there_are_a_few_graphs():
    torch._dynamo.reset()
    model, optimizer = training()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        run(torch.compile(model, backend=counter, fullgraph=True), optimizer, model)
    assert 1 < counter.frame_count <= 8


def test_ranks_that_ask_for_another_path_get_the_same_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = tdlrt.nn.TuckerLinear(64, 64, rank=60)
    x = torch.randn(256, 64)
    paths = [layer.planned_path(layer.plan_shape(x.shape), "training")]
    mark_dynamic_ranks_(layer)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        for rank in (60, 4):
            layer.resize_(layer.core[:rank, :rank], [f[:, :rank] for f in layer.factors])
            assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    paths.append(layer.planned_path(layer.plan_shape(x.shape), "training"))
    assert paths[0] != paths[1]
    assert counter.frame_count == 1


def test_a_model_without_tucker_layers():
    with pytest.raises(tdlrt.NothingMatchedError, match="without Tucker layers"):
        mark_dynamic_ranks_(nn.Linear(2, 2))
