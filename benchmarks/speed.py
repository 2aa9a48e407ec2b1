"""Time of a training step and of inference: Tucker networks against dense and what else there is.

    python benchmarks/speed.py
    python benchmarks/speed.py --models vgg16 --batches 64 --threads 2 --ranks 0.2 0.1
    python benchmarks/speed.py --device cuda --threads 1

Needs the extra `bench`. For a model, a batch size and a number of threads all methods are timed in
turn, round after round, in one process, and every time is the median of the rounds; ratios are to
the dense network, the faster of its NCHW and channels_last forms.

- dense, dense channels_last: the network as it is, torch's SGD with momentum.
- tdlrt: `parallel` examining ranks in every step and every 10, and `bug`, also with ten core steps
  for each step of the bases; `to_plain` for inference.
- tltorch factorized, reconstructed: TensorLy-Torch's Tucker convolutions at the same ranks (linear
  layers stay dense), torch's SGD.
- posthoc: TensorLy's partial Tucker of the channel modes at the same ranks, three convolutions.
- pruned: Torch-Pruning, whole channels, to the same number of parameters.

Inference is timed with batch norms as they are and with those folded into the layers before them
that can be; on a GPU also as one CUDA graph, without the time of launching the kernels.

Writes benchmarks/results/speed.json (speed_cuda.json), group after group, and docs/benchmarks.md;
groups that are there are skipped.
"""

import argparse
import copy
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdlrt
from allocator import keep_freed_memory
from tdlrt.surgery import replace_modules
from tdlrt.surgery.fusion import fuse_batch_norms_
from tdlrt_lab.models import build_model
from tdlrt_lab.run.environment import machine, versions
from tdlrt_lab.run.files import write_text
from tdlrt_lab.run.timing import Case, median_seconds

ROOT = Path(__file__).parent.parent
RESULTS = {
    "cpu": ROOT / "benchmarks/results/speed.json",
    "cuda": ROOT / "benchmarks/results/speed_cuda.json",
}
MODELS = ("vgg16", "resnet18", "alexnet", "linears")
COLUMNS = ("passes", "step", "inference", "folded", "graph")
LR = 1e-6  # ranks stay at their start, and so does the work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--ranks", type=float, nargs="+", default=[0.5, 0.3, 0.2, 0.1, 0.05])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 1, 256])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each group")
    parser.add_argument("--only", nargs="+", default=None, help="methods; default: all")
    parser.add_argument("--device", choices=RESULTS, default="cpu")
    parser.add_argument("--out", type=Path, help="default: in benchmarks/results")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = torch.device(arguments.device)
    out = arguments.out or RESULTS[arguments.device]
    groups = json.loads(out.read_text())["groups"] if out.exists() else []
    done = {key(group) for group in groups}
    for model in arguments.models:
        for batch in arguments.batches:
            for threads in arguments.threads:
                for rank in arguments.ranks:
                    group = {"model": model, "batch": batch, "threads": threads, "rank": rank}
                    if key(group) in done:
                        continue
                    torch.set_num_threads(threads)
                    group |= measure(model, batch, rank, arguments.rounds, arguments.only, device)
                    groups.append(group | {"machine": machine(device)})
                    print(json.dumps(group), flush=True)
                    store(out, groups, f"python benchmarks/speed.py --device {device}")
    if arguments.out is None:
        results = [json.loads(path.read_text()) for path in RESULTS.values() if path.exists()]
        (ROOT / "docs/benchmarks.md").write_text(document(results), encoding="utf-8")


def key(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group[name] for name in ("model", "batch", "threads", "rank"))


def store(path: Path, groups: list[dict[str, Any]], command: str) -> None:
    result = {
        "command": command,
        "versions": versions(),
        "groups": groups,
    }
    write_text(path, json.dumps(result, indent=1) + "\n")


def measure(
    model: str,
    batch: int,
    rank: float,
    rounds: int,
    only: Sequence[str] | None,
    device: torch.device,
) -> dict[str, Any]:
    """Median milliseconds of every method's training step, passes and inference."""
    network, shape = build(model)
    inputs = torch.randn(batch, *shape, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)
    cases: dict[str, dict[str, Case]] = {}
    parameters = {}
    compression = None
    for name, make in methods(network, rank, batch, shape).items():
        if only is None or name in only or name.startswith("dense"):
            subject = make()
            if name.startswith("tdlrt") and compression is None:
                compression = tdlrt.summary(subject.train).compression
            cases[name] = runs(subject, inputs, labels)
            parameters[name] = sum(parameter.numel() for parameter in subject.plain.parameters())
    flat = {(name, what): case for name, their in cases.items() for what, case in their.items()}
    seconds = median_seconds(flat, rounds)
    return {
        "compression": compression,
        "parameters": parameters,
        "ms": {
            name: {what: 1e3 * seconds[name, what] for what in their}
            for name, their in cases.items()
        },
    }


class Subject:
    """A network to train and the one that is used afterwards.

    Args:
        train: The network that is trained.
        optimizer: Its optimiser.
        plain: The network for inference; the same by default.
        channels_last: Whether the inputs come so.
        period: Steps that are timed together, as they differ.
        alternates: Whether a step spends the gradient of one closure call, whatever it is due to.
    """

    def __init__(
        self,
        train: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        plain: nn.Module | None = None,
        channels_last: bool = False,
        period: int = 1,
        alternates: bool = False,
    ) -> None:
        self.train = train
        self.optimizer = optimizer or torch.optim.SGD(train.parameters(), lr=LR, momentum=0.9)
        self.plain = copy.deepcopy(train if plain is None else plain).eval()
        self.channels_last = channels_last
        self.period = period
        self.alternates = alternates


def runs(subject: Subject, inputs: Tensor, labels: Tensor) -> dict[str, Case]:
    """What is timed: passes (forward and backward), the whole step, inference."""
    subject.train.to(inputs.device)
    subject.plain.to(inputs.device)
    folded = copy.deepcopy(subject.plain)
    fuse_batch_norms_(folded, inputs.shape)
    if subject.channels_last and inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)

    def closure() -> Tensor:
        subject.optimizer.zero_grad()
        loss = F.cross_entropy(subject.train(inputs), labels)
        loss.backward()
        return loss

    def step() -> None:
        if subject.alternates:
            closure()
            subject.optimizer.step()
        else:
            subject.optimizer.step(closure)

    @torch.inference_mode()
    def infer(network: nn.Module = subject.plain) -> None:
        network(inputs)

    cases = {
        "passes": Case(run=closure),
        "step": Case(run=step, period=subject.period),
        "inference": Case(run=infer),
    }
    if any(isinstance(module, nn.BatchNorm2d) for module in subject.plain.modules()):
        cases["folded"] = Case(run=lambda: infer(folded))
    if inputs.is_cuda:
        cases["graph"] = Case(run=captured(infer).replay)
    return cases


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of the kernels of a call, after a warm-up on another stream as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def build(model: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network and the shape of an input."""
    torch.manual_seed(0)
    if model != "linears":
        return build_model(model, (3, 32, 32), 10), (3, 32, 32)
    layers = OrderedDict(embed=nn.Linear(384, 384))
    for number in range(1, 5):  # the linear maps of four blocks of a ViT-S, on 65 tokens
        layers[f"up{number}"] = nn.Linear(384, 1536)
        layers[f"gelu{number}"] = nn.GELU()
        layers[f"down{number}"] = nn.Linear(1536, 384)
    return Tokens(nn.Sequential(layers)), (65, 384)


class Tokens(nn.Module):
    """Linear maps on tokens, their mean and a head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(384, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to (batch, tokens, features)."""
        return self.head(self.body(x).mean(dim=1))


def methods(
    network: nn.Module, rank: float, batch: int, shape: tuple[int, ...]
) -> dict[str, Callable[[], Subject]]:
    """A maker for every method that fits the network."""
    dense = {
        "dense": lambda: Subject(copy.deepcopy(network)),
        "dense channels_last": lambda: Subject(channels_last_copy(network), channels_last=True),
    }
    ours = {
        "tdlrt parallel": lambda: tucker(network, rank, batch, shape),
        "tdlrt parallel every 10": lambda: tucker(network, rank, batch, shape, adapt_every=10),
        "tdlrt bug": lambda: tucker(network, rank, batch, shape, integrator="bug"),
        "tdlrt bug, 10 core steps": lambda: tucker(
            network, rank, batch, shape, integrator="bug", core_steps=10
        ),
    }
    if not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        del dense["dense channels_last"]
        return {**dense, **ours}
    others = {
        "tltorch factorized": lambda: tltorch_network(network, rank, "factorized"),
        "tltorch reconstructed": lambda: tltorch_network(network, rank, "reconstructed"),
        "posthoc": lambda: Subject(posthoc(network, rank)),
        "pruned": lambda: Subject(pruned(network, rank, shape), channels_last=True),
    }
    return {**dense, **ours, **others}


def channels_last_copy(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).to(memory_format=torch.channels_last)


def tucker(
    network: nn.Module, rank: float, batch: int, shape: tuple[int, ...], **options: Any
) -> Subject:
    """A Tucker network that examines its ranks and does not change them."""
    model = copy.deepcopy(network)
    tdlrt.factorize_(model, rank=rank)
    optimizer = tdlrt.TDLRT(
        model,
        torch.optim.SGD,
        lr=LR,
        momentum=0.9,
        rank_policy=tdlrt.RelativeTolerance(0.01),
        **{"adapt_every": 1, **options},
    )
    plain = tdlrt.to_plain(model, input_size=(batch, *shape), prefer="speed")
    plain = plain.to(memory_format=torch.channels_last)
    if "core_steps" in options:
        period = 1 + options["core_steps"]
        return Subject(model, optimizer, plain, channels_last=True, period=period, alternates=True)
    period = options.get("adapt_every", 1)
    return Subject(model, optimizer, plain, channels_last=True, period=period)


def tucker_shapes(network: nn.Module, rank: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Convolutions that TDLRT would factorise, with their ranks."""
    report = tdlrt.factorize_(copy.deepcopy(network), rank=rank, dry_run=True)
    for row in report.factorized:
        if row.kind == "Conv2d" and row.ranks is not None:
            yield row.name, row.ranks


def tltorch_network(network: nn.Module, rank: float, implementation: str) -> Subject:
    """TensorLy-Torch's convolutions at random weights of the same ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tltorch

        model = copy.deepcopy(network)
        for name, ranks in tucker_shapes(network, rank):
            layer = tltorch.FactorizedConv.from_conv(
                model.get_submodule(name),
                rank=ranks,
                decompose_weights=False,
                factorization="tucker",
                implementation=implementation,
            )
            replace_modules(model, {model.get_submodule(name): layer})
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)
    return Subject(model)


def posthoc(network: nn.Module, rank: float) -> nn.Module:
    """Partial Tucker of trained kernels (channel modes), as three convolutions each."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    tensorly.set_backend("pytorch")
    model = copy.deepcopy(network)
    for name, ranks in tucker_shapes(network, rank):
        conv: Any = model.get_submodule(name)
        with torch.no_grad():
            (core, (out, in_)), _ = partial_tucker(
                conv.weight, rank=list(ranks[:2]), modes=[0, 1], n_iter_max=1
            )
        reduce = nn.Conv2d(conv.in_channels, core.shape[1], 1, bias=False)
        middle = nn.Conv2d(
            core.shape[1],
            core.shape[0],
            conv.kernel_size,
            conv.stride,
            conv.padding,
            bias=False,
        )
        expand = nn.Conv2d(core.shape[0], conv.out_channels, 1, bias=conv.bias is not None)
        for layer, weight in ((reduce, in_.mT[..., None, None]), (middle, core)):
            layer.weight.data = weight.contiguous()
        expand.weight.data = out[..., None, None].contiguous()
        if conv.bias is not None and expand.bias is not None:
            expand.bias.data = conv.bias.detach().clone()
        replace_modules(model, {conv: nn.Sequential(reduce, middle, expand)})
    return model


def pruned(network: nn.Module, rank: float, shape: tuple[int, ...]) -> nn.Module:
    """Whole channels removed until the network has as many parameters as the Tucker one."""
    import torch_pruning as tp

    target = copy.deepcopy(network)
    tdlrt.factorize_(target, rank=rank)
    wanted = sum(parameter.numel() for parameter in target.parameters())
    low, high = 0.0, 0.99
    best = network
    for _ in range(7):  # bisection: parameters fall with the ratio
        ratio = (low + high) / 2
        model = copy.deepcopy(network)
        head = list(model.modules())[-1]
        pruner = tp.pruner.MagnitudePruner(
            model,
            torch.randn(2, *shape),
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[head],
        )
        pruner.step()
        best = model
        if sum(parameter.numel() for parameter in model.parameters()) > wanted:
            low = ratio
        else:
            high = ratio
    return best.to(memory_format=torch.channels_last)


def line(group: dict[str, Any], method: str, columns: Sequence[str]) -> str:
    """One line of a table: times relative to dense, in the faster of its layouts."""
    shares = []
    for what in columns:
        dense = [ms.get(what) for name, ms in group["ms"].items() if name.startswith("dense")]
        own = group["ms"][method].get(what)
        shares.append("-" if own is None else f"{own / min(dense):.2f}")
    parameters = group["parameters"][method] / group["parameters"]["dense"]
    cells = [str(group[name]) for name in ("batch", "threads", "rank")]
    cells += [f"{100 * group['compression']:.1f}", method, f"{parameters:.3f}", *shares]
    return f"| {' | '.join(cells)} |"


def table(groups: list[dict[str, Any]]) -> str:
    """Lines of all methods but dense."""
    measured = {what for group in groups for what in group["ms"]["dense"]}
    columns = [what for what in COLUMNS if what in measured]
    head = ["batch", "threads", "rank", "compression (%)", "method", "parameters", *columns]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for group in sorted(groups, key=lambda g: (g["batch"], g["threads"], -g["rank"])):
        names = [name for name in group["ms"] if not name.startswith("dense")]
        lines += [line(group, name, columns) for name in names]
    return "\n".join(lines)


def section(result: dict[str, Any]) -> str:
    """The tables of a device."""
    groups = result["groups"]
    tables = [
        f"### {model}\n\n{table([group for group in groups if group['model'] == model])}\n"
        for model in MODELS
        if any(group["model"] == model for group in groups)
    ]
    facts = {**result["versions"], **groups[0]["machine"]}
    del facts["threads"]  # a column
    return f"""\
## On a {"GPU" if facts["device"] == "cuda" else "CPU"}

`{result["command"]}`; {", ".join(f"{key} {value}" for key, value in facts.items())}

{chr(10).join(tables)}"""


def document(results: Sequence[dict[str, Any]]) -> str:
    """The page docs/benchmarks.md."""
    return f"""\
# Benchmarks

How fast is a network in Tucker format, in training and in use, beside the dense network and beside
other methods of the same size? This page gives the times, relative to the dense network.

Written by `python benchmarks/speed.py`; do not edit. More: [single layers](forward-paths.md),
[the integrators' own time](integrator-cost.md), [memory](memory.md).

Everything relative to the dense network in the same run, in the faster of NCHW and channels_last,
with torch's SGD: below 1 is faster, or smaller. *Passes* is forward and backward, *step* the whole
training step, *inference* that of the network one would use for speed (`to_plain`), *folded* the
same with batch norms folded into the layers before them, on both sides, as `tdlrt export` does it;
*compression* is that of the layers tdlrt factorises, *rank* their share of the channels. Ranks stay
at their start. A step of *bug* takes two gradients on a batch; *bug, 10 core steps* takes a batch
for each of eleven gradients, and *step* is the mean of these. The other methods have the same ranks
or, pruned, the same number of parameters; TensorLy-Torch factorises convolutions only. *graph*, on
a GPU, is inference as one CUDA graph, without the time of launching kernels one by one. On a CPU
the allocator keeps freed memory ([why](training-loops.md#time-on-a-cpu)), for all methods.

The times of *step* are from before layers of similar size took their steps in batches; the present
ones, for some of these settings, are those of [the integrators](integrator-cost.md).

{chr(10).join(section(result) for result in results)}"""


if __name__ == "__main__":
    main()
