"""What a step sends to the device, and whole training steps next to dense ones.

    python benchmarks/operations.py
    python benchmarks/operations.py --only counts lenet5

Parts, which `--only` chooses; each takes a minute or two:

- counts: operations of `step()` that are no views and no allocations, and how often it waits until
  the device has done all before, because Python reads a number; for 10 and 40 equal convolutions
  and for VGG16, on a CPU, where the same operations are sent as to a GPU.
- vgg16, deep, lenet5, alexnet: time of a whole step (zero_grad, forward, backward, step) and of the
  dense network's with torch's optimiser, turn by turn; lenet5 also with three busy processes beside
  it. Ranks are fixed, or examined as often as `tdlrt.TDLRT` does by default; they stay.

Writes benchmarks/results/operations.json, part after part, and a section of
docs/integrator-cost.md, which is left alone with --out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tdlrt
from allocator import keep_freed_memory
from tdlrt_lab.documents import fill_section
from tdlrt_lab.models import build_model
from tdlrt_lab.reports.tables import provenance
from tdlrt_lab.run.environment import machine, versions
from tdlrt_lab.run.files import write_text
from tdlrt_lab.run.timing import Case

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/operations.json"
DOCUMENT = ROOT / "docs/integrator-cost.md"
Row = dict[str, Any]

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], Row]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {}),
}
LAYOUTS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}

# --- networks -----------------------------------------------------------------------------------


def deep(layers: int) -> nn.Module:
    """Equal 3x3 convolutions of 64 channels one after the other."""
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1)]
    for _ in range(layers):
        parts += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


NETWORKS: dict[str, tuple[tuple[int, int, int], Callable[[], nn.Module]]] = {
    "10 layers": ((3, 8, 8), partial(deep, 10)),
    "40 layers": ((3, 8, 8), partial(deep, 40)),
    "vgg16": ((3, 32, 32), partial(build_model, "vgg16", (3, 32, 32), 10)),
    "alexnet": ((3, 32, 32), partial(build_model, "alexnet", (3, 32, 32), 10)),
    "lenet5": ((1, 28, 28), partial(build_model, "lenet5", (1, 28, 28), 10)),
}


def problem(
    network: str, batch: int, rank: float | None, layout: str
) -> tuple[nn.Module, Callable[[], None]]:
    """A network, dense or factorised, and its forward and backward passes on a batch of noise."""
    torch.manual_seed(0)
    shape, build = NETWORKS[network]
    model = build()
    if rank is not None:
        tdlrt.factorize_(model, rank=rank)
    model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    images = torch.randn(batch, *shape).to(memory_format=LAYOUTS[layout])
    labels = torch.randint(0, 10, (batch,))

    def passes() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    return model, passes


# --- operations ---------------------------------------------------------------------------------

WARM_UP = 3
COUNTED_RANK, COUNTED_RATE = 0.25, 1e-3
COUNTED: dict[str, Row] = {
    "fixed": {"rank_policy": tdlrt.FixedRank()},
    "tolerance, every step": {"rank_policy": tdlrt.RelativeTolerance(0.1), "adapt_every": 1},
    "budget, every step": {"rank_policy": tdlrt.ParameterBudget(0.1), "adapt_every": 1},
    "bug, tolerance": {"rank_policy": tdlrt.RelativeTolerance(0.1), "integrator": "bug"},
}
COUNTS = [*product(("40 layers", "10 layers"), COUNTED), ("vgg16", "fixed")]

# What launches nothing, beside the views, which say so themselves.
ALLOCATIONS = frozenset(
    ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
) | {"set_"}
# Operations whose result is on the host, so that the program waits for the device.
WAITS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select")
# Operations that look at the device themselves, to see whether they succeeded.
DECOMPOSITIONS = ("_linalg_eigh", "_linalg_svd", "_linalg_check_errors")
# Reads of whole tensors, which on a CPU reach no operation.
READS = ("tolist", "cpu", "numpy")


class Operations(TorchDispatchMode):
    """Counts operations and waits of the thread that enters it.

    What is computed from tensors that were read with `cpu()` alone would not be sent to a device,
    and is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.reads = 0
        self._on_host: dict[int, Tensor] = {}  # the tensors too: an id may be given out again

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count, then do it."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if given and all(id(tensor) in self._on_host for tensor in given):
            self._keep(result)
        elif function.namespace == "aten" and not function.is_view and name not in ALLOCATIONS:
            self.calls[name] += 1
        return result

    def read(self, method: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Count a read, unless what is read was before."""
        self.reads += id(tensor) not in self._on_host
        result = method(tensor, *args, **kwargs)
        if isinstance(result, Tensor):
            result = result.view_as(result)  # `cpu()` gives back a tensor that is there already
        self._keep(result)
        return result

    def _keep(self, result: Any) -> None:
        found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._on_host.update((id(tensor), tensor) for tensor in found)

    def summary(self) -> Row:
        """Numbers of operations, of waits for a result, and of decompositions that wait inside."""
        return {
            "operations": self.calls.total(),
            "waits": self.reads + sum(self.calls[name] for name in WAITS),
            "decompositions": sum(self.calls[name] for name in DECOMPOSITIONS),
        }


@contextmanager
def counted(operations: Operations) -> Iterator[None]:
    """Count what runs inside."""
    with ExitStack() as stack:
        for name in READS:
            method = getattr(Tensor, name)

            def read(tensor: Tensor, *args: Any, _method: Any = method, **kwargs: Any) -> Any:
                return operations.read(_method, tensor, *args, **kwargs)

            stack.enter_context(patch.object(Tensor, name, read))
        stack.enter_context(operations)
        yield


def count(network: str, case: str) -> Row:
    """Operations and waits of a step; `bug` takes two calls, for the bases and for the core."""
    model, passes = problem(network, 4, COUNTED_RANK, "channels_last")
    optimizer_cls, options = OPTIMIZERS["SGD"]
    optimizer = tdlrt.TDLRT(model, optimizer_cls, lr=COUNTED_RATE, **options, **COUNTED[case])
    calls = 2 if optimizer.integrator == "bug" else 1
    operations = count_calls(passes, optimizer, calls)
    others = optimizer_cls(optimizer.param_groups[1]["params"], lr=COUNTED_RATE, **options)
    return {
        "network": network,
        "case": case,
        **operations.summary(),
        "of_others": count_calls(passes, others, 1).summary()["operations"],
        "compression": tdlrt.summary(model).compression,
        "most": dict(operations.calls.most_common(8)),
    }


def count_calls(
    passes: Callable[[], None], optimizer: torch.optim.Optimizer, calls: int
) -> Operations:
    """What so many calls of `step()` send, after the warm-up and each with a fresh gradient."""
    for _ in range(WARM_UP * calls):
        passes()
        optimizer.step()
    operations = Operations()
    for _ in range(calls):
        passes()
        with counted(operations):
            optimizer.step()
    return operations


def counts(seconds: float) -> list[Row]:
    """All counts, on one thread: what other threads send is not seen."""
    torch.set_num_threads(1)
    rows = []
    for network, case in COUNTS:
        rows.append(count(network, case))
        print(rows[-1], flush=True)
    return rows


# --- whole steps --------------------------------------------------------------------------------

LEAST_ROUNDS = 5
RATES = {"SGD": 1e-6, "Adam": 1e-8}
# A tolerance under which ranks stay: the default one cuts a little more in every such small step.
POLICIES: dict[str, Row] = {
    "fixed": {"rank_policy": tdlrt.FixedRank()},
    # As `TDLRT` does by default after its first 100 steps.
    "examined": {"rank_policy": tdlrt.RelativeTolerance(0.01), "adapt_every": 10},
    "fixed, bases move in every 8th": {"rank_policy": tdlrt.FixedRank(), "basis_every": 8},
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Whole steps that are timed together.

    Attributes:
        network: Name in `NETWORKS`.
        batch: Images of a step.
        ranks: Initial ranks, as shares of the channels.
        policies: Names in `POLICIES`.
        optimizer: Name in `OPTIMIZERS`.
        threads: Threads of torch.
        busy: Processes that compute beside it.
    """

    network: str
    batch: int
    ranks: Sequence[float] = (0.2,)
    policies: Sequence[str] = ("fixed", "examined")
    optimizer: str = "SGD"
    threads: int = 2
    busy: int = 0


SETTINGS: dict[str, Sequence[Setting]] = {
    "vgg16": [Setting(network="vgg16", batch=64, ranks=(0.2, 0.1))],
    "deep": [
        Setting(network="40 layers", batch=batch, ranks=(0.25,), optimizer="Adam", threads=1)
        for batch in (32, 8)
    ],
    "lenet5": [Setting(network="lenet5", batch=32, busy=busy) for busy in (0, 3)],
    "alexnet": [Setting(network="alexnet", batch=64, policies=tuple(POLICIES))],
}


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Other processes that take what they get of the processor."""
    words = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(words) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
        for other in others:
            other.wait()


def timed(setting: Setting, seconds: float) -> list[Row]:
    """A row per rank and policy, against the faster layout of the dense network."""
    torch.set_num_threads(setting.threads)
    optimizer_cls, options = OPTIMIZERS[setting.optimizer]
    options = {**options, "lr": RATES[setting.optimizer]}
    cases: dict[Any, Case] = {}
    models: dict[Any, nn.Module] = {}
    for layout in LAYOUTS:
        model, passes = problem(setting.network, setting.batch, None, layout)
        cases[layout] = whole_step(passes, optimizer_cls(model.parameters(), **options))
    for name in product(setting.ranks, setting.policies):
        rank, policy = name
        models[name], passes = problem(setting.network, setting.batch, rank, "channels_last")
        optimizer = tdlrt.TDLRT(models[name], optimizer_cls, **options, **POLICIES[policy])
        cases[name] = whole_step(
            passes, optimizer, max(optimizer.adapt_every or 1, optimizer.basis_every)
        )
    with busy_processes(setting.busy):
        times = paired_seconds(cases, seconds)
    dense = min((times[layout] for layout in LAYOUTS), key=statistics.median)
    rows = []
    for (rank, policy), model in models.items():
        own = times[rank, policy]
        ratios = [mine / other for mine, other in zip(own, dense, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                **{name: getattr(setting, name) for name in ("network", "batch", "optimizer")},
                **{"threads": setting.threads, "busy": setting.busy},
                **{"rank": rank, "policy": policy, "adapt_every": cases[rank, policy].period},
                "compression": tdlrt.summary(model).compression,
                "rounds": len(ratios),
                "dense_ms": 1e3 * statistics.median(dense),
                "ms": 1e3 * statistics.median(own),
                "of_dense": middle,
                "quartiles": [low, high],
            }
        )
        print(rows[-1], flush=True)
    return rows


def whole_step(
    passes: Callable[[], None], optimizer: torch.optim.Optimizer, period: int = 1
) -> Case:
    """A step with its passes."""

    def run() -> None:
        passes()
        optimizer.step()

    return Case(run=run, period=period)


def paired_seconds(cases: Mapping[Any, Case], seconds: float) -> dict[Any, list[float]]:
    """Time of each case in each round, in which the cases take turns; the first round warms up."""
    samples: dict[Any, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case.seconds()
    start, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < seconds:
        for name, case in cases.items():
            samples[name].append(case.seconds())
        rounds += 1
    return samples


def steps(part: str, seconds: float) -> list[Row]:
    """Rows of all settings of a part."""
    return [row for setting in SETTINGS[part] for row in timed(setting, seconds)]


PARTS: dict[str, Callable[[float], list[Row]]] = {
    "counts": counts,
    **{part: partial(steps, part) for part in SETTINGS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=30, help="of timing, for each setting")
    parser.add_argument("--out", type=Path, help="default: in benchmarks/results")
    arguments = parser.parse_args()
    keep_freed_memory()
    out = arguments.out or RESULT
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"] if out.exists() else {}
    for name in arguments.only:
        rows = PARTS[name](arguments.seconds)
        facts = machine(torch.device("cpu"))
        del facts["threads"]  # of each row
        parts[name] = {"versions": versions(), "machine": facts, "rows": rows}
        result = {
            "command": "python benchmarks/operations.py",
            "seed": 0,
            "parts": {part: parts[part] for part in PARTS if part in parts},
        }
        write_text(out, json.dumps(result, indent=1) + "\n")
    if arguments.out is None:
        fill(DOCUMENT)


# --- the section --------------------------------------------------------------------------------


def fill(document: Path) -> None:
    """Put what was measured between the marks of a document; nothing before that."""
    if RESULT.exists():
        fill_section(document, "operations", section(json.loads(RESULT.read_text("utf-8"))))


def section(result: Row) -> list[str]:
    """Lines of the section."""
    parts = result["parts"]
    lines = [f"Written by `{result['command']}`."]
    if "counts" in parts:
        text = OPERATIONS_TEXT.format(rank=COUNTED_RANK, warm_up=WARM_UP)
        lines += ["", *text.splitlines(), ""]
        lines += table(OPERATIONS_HEAD, [count_cells(row) for row in parts["counts"]["rows"]])
    timed_rows = [row for name in SETTINGS if name in parts for row in parts[name]["rows"]]
    if timed_rows:
        lines += ["", *STEPS_TEXT.splitlines(), ""]
        lines += table(STEPS_HEAD, [step_cells(row) for row in timed_rows])
    return [*lines, "", *(f"- {fact}" for fact in provenance(parts.values()))]


OPERATIONS_HEAD = (
    *("network", "step", "operations", "for other parameters", "waits", "decompositions"),
)
OPERATIONS_TEXT = """\
Operations of a step that are no views and no allocations, SGD with momentum 0.9, ranks at {rank} of
the channels before the first step; {warm_up} steps went before. Beside it, *for other parameters*:
what torch's optimiser takes for batch norms, biases and the head by itself, one after the other;
`TDLRT` lets it move them together. *Waits* are reads of a
result by Python, *decompositions* those that on a GPU wait themselves, to see whether they
succeeded. The networks of 10 and 40 layers have equal 3x3 convolutions of 64 channels. `bug` counts
with its two calls of `step()`."""

STEPS_HEAD = (
    *("network", "batch", "threads", "optimiser", "beside it", "rank", "compression (%)"),
    *("ranks", "dense (ms)", "step (ms)", "step of dense (%)"),
)
STEPS_TEXT = """\
Whole steps (zero_grad, forward, backward, step) in channels_last against the dense network with
torch's optimiser in the faster of both layouts. The networks take turns; *step of dense* is the
median over the turns, with its quartiles. Ranks are *fixed*, or *examined* in every tenth step, as
by default after the first 100, with a tolerance that leaves them where they start; 40 layers are
those of the table above, on 8x8 images."""


def count_cells(row: Row) -> list[str]:
    numbers = ("operations", "of_others", "waits", "decompositions")
    return [row["network"], row["case"], *(f"{row[name]:,}" for name in numbers)]


def step_cells(row: Row) -> list[str]:
    low, high = row["quartiles"]
    others = f"{row['busy']} busy processes" if row["busy"] else "nothing"
    return [
        *(str(row[name]) for name in ("network", "batch", "threads", "optimizer")),
        *(others, str(row["rank"]), f"{100 * row['compression']:.1f}", row["policy"]),
        *(f"{row['dense_ms']:.1f}", f"{row['ms']:.1f}"),
        f"{100 * row['of_dense']:.0f} ({100 * low:.0f} to {100 * high:.0f})",
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def table_section(
    result: Row, text: str, head: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[str]:
    """Lines of a section with one table: the command, what was measured, the table, and where."""
    facts = [f"- {fact}" for fact in provenance([result])]
    command = f"Written by `{result['command']}`."
    return [command, "", *text.splitlines(), "", *table(head, rows), "", *facts]


if __name__ == "__main__":
    main()
