"""What the processes of the tests of data-parallel training do."""

from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

import tdlrt
from optim.problems import Small
from reference.cases import gaussian
from tdlrt.integrations import distributed
from tdlrt.optim.batch import Batch

POLICIES = {
    "tolerance": lambda: tdlrt.RelativeTolerance(tdlrt.LinearSchedule(0.0, 0.3, 40), spare=0.1),
    "budget": lambda: tdlrt.ParameterBudget(tdlrt.LinearSchedule(1.0, 0.5, 30), spare=0.1),
}
HALVES = (slice(0, 16), slice(16, 32))


def problem(*, seed=0, name="momentum", **options):
    """A network in float64 without batch norm, with its data and its optimiser.

    More images than ranks: the gradient then fixes every direction that `bug` adds.
    """
    data = Small(name, seed=seed, dtype=torch.float64, **options)
    data.inputs, data.labels = gaussian((32, 3, 6), 1), torch.arange(32) % 4
    return data


def loss_on(model, data, rows):
    return nn.functional.cross_entropy(model(data.inputs[rows]), data.labels[rows])


def accumulate(model, data, rows, sync=True):
    with nullcontext() if sync else model.no_sync():
        loss_on(model, data, rows).backward()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@contextmanager
def counted():
    """Numbers of entries of the all-reduces of cores and bases inside."""
    sizes, original = [], dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        dist.all_reduce = original


def trajectory(model, data, rows, integrator, steps):
    """Weights in full after these steps, half of them on closures; ranks of each; the state."""
    optimizer, ranks = data.optimizer, []

    def closure():
        optimizer.zero_grad()
        loss = loss_on(model, data, rows)
        loss.backward()
        return loss

    for step in range(steps):
        if step % 2:
            optimizer.step(closure)
        else:
            for _ in range(2 if integrator == "bug" else 1):
                closure()
                optimizer.step()
        ranks.append(data.ranks)
    return tdlrt.to_dense(data.model).state_dict(), ranks, optimizer.state_dict()


def train(process, integrator, policy, name, steps, **options):
    """On one of the processes, or on one that is alone (None)."""
    data = problem(
        name=name,
        integrator=integrator,
        rank_policy=POLICIES[policy](),
        adapt_every=2 if policy == "budget" else 1,
    )
    if process is None:
        return trajectory(data.model, data, slice(None), integrator, steps)
    model, _ = distributed.wrap(data.model, data.optimizer, check_every=7, **options)
    found = trajectory(model, data, HALVES[process], integrator, steps)
    distributed.check_replicas(data.model)
    return found


def train_sharded(process, *arguments):
    return train(process, *arguments, shard_integrator=True)


def computed(process):
    """The layers whose gradients this process looks at."""
    data = problem()
    model, optimizer = distributed.wrap(data.model, data.optimizer, shard_integrator=True)
    accumulate(model, data, HALVES[process])
    names, original = [], Batch.gradients

    def gradients(batch, places):
        places = list(places)
        names.extend(batch.slots[place].name for place in places)
        return original(batch, places)

    Batch.gradients = gradients
    try:
        optimizer.step()
    finally:
        Batch.gradients = original
    return names


def overflow(process):
    """The step of one layer, which the second process computes, becomes infinite."""
    data = problem(skip_nonfinite=1)
    model, optimizer = distributed.wrap(data.model, data.optimizer, shard_integrator=True)
    shares = list(optimizer.team.share(["0", "3"]))
    before = {name: p.detach().clone() for name, p in data.model.named_parameters()}
    caught = ""
    for _ in range(2):
        optimizer.zero_grad()
        accumulate(model, data, HALVES[process])
        for parameter in (data.layers[0].core, *data.layers[0].factors):
            parameter.grad.fill_(1e308)
        try:
            optimizer.step()
        except tdlrt.NonFiniteError as error:
            caught = str(error)
    same = all(torch.equal(before[name], p) for name, p in data.model.named_parameters())
    return shares, caught, same, optimizer.skipped_steps


def turn_bases(layer):
    """The same weight in other bases."""
    for mode in layer.learned_modes:
        turn, _ = torch.linalg.qr(gaussian((layer.ranks[mode],) * 2, mode + 5))
        with torch.no_grad():
            layer.factors[mode].copy_(layer.factors[mode] @ turn)
            layer.core.copy_(torch.tensordot(layer.core, turn, ([mode], [0])).movedim(-1, mode))


def written(process, integrator, frozen, options):
    """The state after bases were written from outside, and weights some steps later.

    Both layers are written; the second one is frozen for a step, or not.
    """
    data = problem(
        name="momentum",
        integrator=integrator,
        rank_policy=tdlrt.ParameterBudget(0.7),
        adapt_every=2,
    )
    model, rows = data.model, slice(None)
    if process is not None:
        model, _ = distributed.wrap(data.model, data.optimizer, check_every=1, **options)
        rows = HALVES[process]
    trajectory(model, data, rows, integrator, 3)
    weight = [data.layers[1].core, *data.layers[1].factors] if frozen else []
    for parameter in weight:
        parameter.requires_grad_(False)
    for layer in data.layers:
        turn_bases(layer)
    state = data.optimizer.state_dict()["state"]
    if frozen:
        trajectory(model, data, rows, integrator, 1)
    for parameter in weight:
        parameter.requires_grad_(True)
    weights, ranks, _ = trajectory(model, data, rows, integrator, 4)
    if process is not None:
        distributed.check_replicas(data.model)
    return {f"{n} {key}": of for n, entries in state.items() for key, of in entries.items()}, (
        weights,
        ranks,
    )


def start(process):
    """Other weights and other ranks on every process, before."""
    data = problem(seed=process, rank=(0.5, 0.8)[process])
    model, _ = distributed.wrap(data.model, data.optimizer)
    accumulate(model, data, HALVES[process])
    data.optimizer.step()
    return data.model.state_dict(), data.ranks


def diverge(process, how):
    data = problem()
    model, _ = distributed.wrap(data.model, data.optimizer, check_every=2)
    for step in range(3):
        if process == 1 and step == 1:
            how(data)
        accumulate(model, data, HALVES[process])


def nudge(data):
    with torch.no_grad():
        data.layers[1].core[0, 0] += 1e-12


def cut(data):
    layer = data.layers[0]
    first, *others = layer.factors
    layer.resize_(layer.core[:-1], [first[:, :-1], *others])


def no_sync(process):
    data = problem()
    model, _ = distributed.wrap(data.model, data.optimizer)
    first, second = torch.arange(32)[HALVES[process]].chunk(2)
    with counted() as sizes:
        accumulate(model, data, first, sync=False)
        local = gradients(data.model)["3.core"].clone()
        accumulate(model, data, second)
    alone = problem()
    for rows in torch.arange(32).chunk(4):
        loss_on(alone.model, alone, rows).backward()
    expected = {name: grad / 2 for name, grad in gradients(alone.model).items()}
    return sizes, local, gradients(data.model), expected


class Branches(nn.Module):
    """Three branches, chosen by name; a dense head."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleDict({key: nn.Linear(6, 6, dtype=torch.float64) for key in "abc"})
        self.head = nn.Linear(6, 2, dtype=torch.float64)
        tdlrt.factorize_(self, rank=2)

    def forward(self, input, key):
        return self.head(input if key is None else self.branches[key](input))


def branches(process, keys):
    """Gradients where each process takes another branch, or none."""
    torch.manual_seed(0)
    net = Branches()
    optimizer = tdlrt.TDLRT(net, torch.optim.SGD, lr=0.1, tau=0.5)
    model, _ = distributed.wrap(net, optimizer, find_unused_parameters=True)
    model(gaussian((3, 6), process), keys[process]).square().sum().backward()
    found = {name: None if grad is None else grad.clone() for name, grad in gradients(net).items()}
    optimizer.step()
    distributed.check_replicas(net)
    return found


def clip(process):
    data = problem()
    model, _ = distributed.wrap(data.model, data.optimizer)
    accumulate(model, data, HALVES[process])
    norm = data.optimizer.clip_grad_norm_(0.01)
    data.optimizer.step()
    return norm, tdlrt.to_dense(data.model).state_dict()


def scale(process):
    """An infinite gradient of a core on the second process alone."""
    data = problem()
    model, _ = distributed.wrap(data.model, data.optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    data.layers[0].core.register_hook(lambda grad: grad / 0 if process else grad)
    before = data.layers[0].core.detach().clone()
    scaler.scale(loss_on(model, data, HALVES[process])).backward()
    scaler.step(data.optimizer)
    scaler.update()
    return torch.equal(before, data.layers[0].core), scaler.get_scale()


def payload(process):
    """Entries sent in a backward pass, and parameters of the factors, before and after a cut."""
    data = problem()
    model, _ = distributed.wrap(data.model, data.optimizer)
    found = []
    for _ in range(2):
        with counted() as sizes:
            accumulate(model, data, HALVES[process])
        found.append((sizes, sum(layer.weight_parameters for layer in data.layers)))
        data.optimizer.rank_policy = tdlrt.RelativeTolerance(0.6)
        data.optimizer.step()
        data.optimizer.zero_grad()
    return found


def payload_of_bug(process):
    """Entries sent in each pass of a `bug` step without a closure; entries of the cores in each."""
    data = problem(integrator="bug")
    model, optimizer = distributed.wrap(data.model, data.optimizer)
    found, none = [], []
    for _ in range(2):
        optimizer.zero_grad()
        cores = [layer.core.numel() for layer in data.layers]
        with counted() as sizes:
            accumulate(model, data, HALVES[process])
        found.append((sizes, cores))
        none.append(all(f.grad is None for layer in data.layers for f in layer.factors))
        optimizer.step()
    return found, none


def reduced(process):
    """Relative differences of gradients of cores and bases sent in bfloat16 from those in full."""
    found = []
    for dtype in (torch.bfloat16, None):
        data = problem()
        model, _ = distributed.wrap(data.model, data.optimizer, reduce_dtype=dtype)
        accumulate(model, data, HALVES[process])
        found.append([p.grad for layer in data.layers for p in (layer.core, *layer.factors)])
    return [float((one - other).norm() / other.norm()) for one, other in zip(*found, strict=True)]


def two_trainings(process, apart):
    """Of two models in turn, in one group, or each process alone with its own model in its own."""
    groups = [dist.new_group([n]) if apart else None for n in range(2)]
    own = [process] if apart else [0, 1]
    found = []
    for number in own:
        data = problem(seed=number)
        model, _ = distributed.wrap(data.model, data.optimizer, process_group=groups[number])
        found.append((model, data))
    rows = slice(0, 32) if apart else HALVES[process]
    for _ in range(6):
        for model, data in found:
            data.optimizer.zero_grad()
            accumulate(model, data, rows)
        for _, data in found:
            data.optimizer.step()
    for number, (_, data) in zip(own, found, strict=True):
        distributed.check_replicas(data.model, groups[number])
    return {n: tdlrt.to_dense(d.model).state_dict() for n, (_, d) in zip(own, found, strict=True)}


def uneven(process):
    """Nine images and 23, weighted by their numbers."""
    data = problem()
    model, _ = distributed.wrap(data.model, data.optimizer)
    rows = (slice(0, 9), slice(9, 32))[process]
    (loss_on(model, data, rows) * len(data.labels[rows]) * 2 / 32).backward()
    alone = problem()
    loss_on(alone.model, alone, slice(None)).backward()
    return gradients(data.model), gradients(alone.model)
