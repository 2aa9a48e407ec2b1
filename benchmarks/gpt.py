"""A GPT from scratch: bits per character, and what a step and the memory of each method cost.

    python benchmarks/accuracy.py --only 'stdlib_gpt*'
    python benchmarks/gpt.py

The first command trains the networks and records their results; this one measures a training step
of each row of the experiment and its memory, and writes benchmarks/results/gpt.json and
docs/gpt.md. With --page it only writes the page.

Times are processor seconds of one thread, so that other programs on the machine change them little:
medians of rounds in which every network takes its turn, at a learning rate too small to change the
ranks. Each memory is that of a process of its own, with an allocator that returns what is freed.
"""

import argparse
import json
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comparisons import EXPERIMENTS, RESULTS, ROOT, Result, as_runs, recorded
from findings import markdown
from memory import RETURNING, in_process, peak
from saved import saved_bytes
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import load_data
from tdlrt_lab.data.text_data import EPOCH_WINDOWS
from tdlrt_lab.options import RunOptions
from tdlrt_lab.reports.groups import Group, repetitions
from tdlrt_lab.reports.tables import provenance
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text
from tdlrt_lab.run.timing import Case, median_seconds
from tdlrt_lab.run.training import Training
from tdlrt_lab.spread import format_spread
from tdlrt_lab.sweep.plan import read_sweep

EXPERIMENT, LONGER = "stdlib_gpt", "stdlib_gpt_8"
RESULT = RESULTS / "gpt.json"
PAGE = ROOT / "docs/gpt.md"
RATE = 1e-6
TOLERANCE = 0.01
"""Too small to cut anything of a start, and too large for what RATE adds to it."""

LINEAR = 6 * 12 * 256**2
"""Weights of the linear layers of the blocks."""

NEUTRAL = {name: getattr(RunOptions, name) for name in ("integrator", "core_steps", "basis_every")}
NEUTRAL |= dict.fromkeys(("ramp", "spare", "adapt_every", "freeze_at"))
"""Options of tdlrt that tucker does not use."""

WANTED_LOSS = 0.02
"""Bits per character by which a network of half the parameters may be worse than dense."""

INTRODUCTION = f"""\
# A GPT from scratch

Can a language model be trained in Tucker format from the start, and at what loss of quality? This
page compares a small GPT with the dense one and with factors of the same size.

Written by `python benchmarks/gpt.py`; do not edit.

```sh
tdlrt train gpt --data stdlib --budget 0.25
```

trains a GPT of 6 layers and width 256 on the sources of Python's own standard library, without a
download. Characters are ASCII; every tenth file is held out. The 24 linear layers of the blocks
(query, key and value as one, projection, and both of the MLP) hold {LINEAR:,} of the network's
4,837,504 parameters; embeddings, norms and the head stay dense. The sources differ between versions
of Python: compare runs of one version, whose digests the results record.
"""

MISSING = "No run is recorded yet; `python benchmarks/accuracy.py --only stdlib_gpt` does them."

SOURCES = (
    "The commands, the learning rates and the runs that chose them are among the "
    "[results](results.md#gpt-on-stdlib-learning-rates)."
)

HEAD = ("method", "seeds", "bits per character", "accuracy (%)", "linear parameters", "of dense")
COSTS = ("step (ms)", "step with examinations (ms)", "weights (MB)", "gradients (MB)", "state (MB)")
COSTS += ("saved (MB)", "peak (MB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--page", action="store_true", help="write the page without measuring")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(memory(**json.loads(arguments.case))))
        return
    groups = rows(recorded(EXPERIMENT))
    if not arguments.page:
        torch.set_num_threads(1)
        write_text(RESULT, json.dumps(measure(arguments.rounds), indent=1) + "\n")
    write_text(PAGE, document(groups, json.loads(RESULT.read_text("utf-8"))))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def rows(results: Sequence[Result]) -> list[Group]:
    """The recorded rows in the order of the experiment, each with its seeds."""
    order = list(read_sweep(EXPERIMENTS[EXPERIMENT]).rows)
    groups = [Group(runs=runs, label_parts={"": name(runs[0].config)}) for runs in
              repetitions(as_runs(results))]  # fmt: skip

    def place(group: Group) -> tuple[int, float]:
        return order.index(group.first.summary["row"].split("_")[0]), group.mean("compression")

    return sorted(groups, key=place)


def name(config: dict[str, Any]) -> str:
    """Method and size of a row."""
    size = "" if config["budget"] is None else f" {config['budget']:g}"
    return f"{config['method']}{size}"


def measure(rounds: int) -> dict[str, Any]:
    """Time and memory of a step of every row of the experiment."""
    kinds = {name(one.to_dict()): steps(one) for one in first_seeds()}
    cases = {
        (label, kind): Case(run=step_of(training(config)), period=period, clock=time.process_time)
        for label, of in kinds.items()
        for kind, config, period in of
    }
    seconds = median_seconds(cases, rounds)
    measured: dict[str, dict[str, float]] = {}
    for label, of in kinds.items():
        _, config, _ = of[0]
        measured[label] = in_process({"options": config.to_dict()}, RETURNING, __file__)
        measured[label] |= {f"{kind}_ms": 1e3 * seconds[label, kind] for kind, _, _ in of}
        print(label, measured[label], flush=True)
    return {
        **made_by(shlex.join(["python", "benchmarks/gpt.py", *sys.argv[1:]])),
        "rows": measured,
    }


def first_seeds() -> list[RunConfig]:
    """The options of every row of the experiment, with its first seed."""
    runs = read_sweep(EXPERIMENTS[EXPERIMENT]).runs(".")
    return [run.config for run in runs if run.config.seed == runs[0].config.seed]


def steps(row: RunConfig) -> list[tuple[str, RunConfig, int]]:
    """The options of a row for a step at fixed ranks and, for tdlrt, one that examines them.

    The ranks of tdlrt are then the same share of each mode in all layers: as large as its budget
    allows. Those that a training finds have the same number of parameters.

    Returns:
        Kind, options, and the number of steps after which the cost repeats.
    """
    options = row.to_dict() | {"lr": RATE, "device": "cpu"}
    if row.method != "tdlrt":
        return [("fixed", RunConfig(**options), 1)]
    equal = training(RunConfig(**{**options, "method": "tucker", "lr": None, **NEUTRAL})).ranks
    options |= {"budget": None, "spare": None, "ramp": None, "rank": equal}
    fixed = options | {"freeze_at": 0.0, "adapt_every": None}
    examined = options | {"freeze_at": 1.0, "tau": TOLERANCE}
    return [
        ("fixed", RunConfig(**fixed), 1),
        ("examined", RunConfig(**examined), row.adapt_every),
    ]


def training(config: RunConfig) -> Training:
    """The network of a row at its start, with its optimiser."""
    torch.manual_seed(0)
    return Training(config, load_data(config.data))


def step_of(trained: Training) -> Any:
    """A whole training step on one batch, as a function."""
    inputs, labels = batch(trained)

    def step() -> None:
        trained.optimizer.zero_grad()
        F.cross_entropy(trained.model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        trained.optimizer.step()

    return step


def batch(trained: Training) -> tuple[Tensor, Tensor]:
    (context,) = trained.input_size[1:]
    return trained.sample(trained.config.batch_size * context)


def memory(options: dict[str, Any]) -> dict[str, int]:
    """Bytes of weights, gradients, state and saved tensors, and the peak, of the whole network."""
    torch.set_num_threads(1)
    config = RunConfig(**options)
    data = load_data(config.data)
    before = peak("cpu")
    torch.manual_seed(0)
    trained = Training(config, data)
    inputs, labels = batch(trained)
    for _ in range(3):
        trained.optimizer.zero_grad()
        saved, loss = saved_bytes(
            trained.model, lambda: F.cross_entropy(trained.model(inputs), labels)
        )
        loss.backward()
        trained.optimizer.step()
    parameters = list(trained.model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    state = [v for p in parameters for v in trained.optimizer.state.get(p, {}).values()]
    return {
        "weights": size(parameters),
        "gradients": size(gradients),
        "state": size([value for value in state if isinstance(value, Tensor) and value.ndim]),
        "saved": saved,
        "peak": peak("cpu") - before,
    }


def size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def document(groups: Sequence[Group], costs: dict[str, Any]) -> str:
    """The page docs/gpt.md."""
    sweep, config = read_sweep(EXPERIMENTS[EXPERIMENT]), first_seeds()[0]
    steps = config.epochs * EPOCH_WINDOWS // config.batch_size
    recipe = (
        f"{steps} steps of {config.batch_size} windows of 128 characters. AdamW for all, with "
        f"weight decay {config.weight_decay:g} and a warm-up of {100 * config.warmup:g} % of the "
        "steps. *matrix* trains the factors U and V of each W = U V^T directly, at the same rank "
        "everywhere up to rounding. Means over the seeds, ± one standard deviation; lower is "
        f"better. {sweep.note}"
    )
    measured = (
        f"Processor time of one step of {config.batch_size} windows on one thread, by "
        f"`{costs['command']}`. The ranks of tdlrt are the same share of each mode in all layers, "
        "as large as the budget allows. *Step* is at fixed ranks, as in the second half of a "
        "training; *step with examinations* is the mean of 10 steps of which one examines the "
        "ranks, as in the first half. *Weights*, *gradients* and *state* are those of the whole "
        "network, *saved* is what autograd keeps between the passes, and *peak* how far the "
        "process grew."
    )
    return "\n\n".join(
        [
            INTRODUCTION.strip(),
            "## Bits per character",
            textwrap.fill(recipe, 100),
            *(recorded_part(groups) if groups else [MISSING]),
            *longer_part(rows(recorded(LONGER))),
            "## Time and memory",
            textwrap.fill(measured, 100),
            markdown((HEAD[0], *COSTS), [cost(*row) for row in costs["rows"].items()]),
            "\n".join(f"- {fact}" for fact in provenance([costs])) + "\n",
        ]
    )


def recorded_part(groups: Sequence[Group]) -> list[str]:
    """The table of bits per character, what it says, and where it comes from."""
    facts = provenance(run.summary for group in groups for run in group.runs)
    return [
        markdown(HEAD, [quality(group) for group in groups]),
        findings(groups),
        textwrap.fill(SOURCES, 100),
        "\n".join(f"- {fact}" for fact in facts),
    ]


def longer_part(groups: Sequence[Group]) -> list[str]:
    """The table of a longer training."""
    if not groups:
        return []
    note = textwrap.fill(read_sweep(EXPERIMENTS[LONGER]).note, 100)
    cells = [[*quality(group), f"{group.first.config['lr']:g}"] for group in groups]
    return ["### In a longer training", note, markdown((*HEAD, "learning rate"), cells)]


def quality(group: Group) -> list[str]:
    summary = group.first.summary
    return [
        group.label,
        ", ".join(str(run.summary["seed"]) for run in group.runs),
        format_spread(group.values("bits_per_character"), 3),
        format_spread(group.values("accuracy"), 2),
        f"{statistics.mean(group.values('parameters')):,.0f}"
        if summary["method"] != "dense"
        else f"{LINEAR:,}",
        f"{1 - group.mean('compression'):.3f}",
    ]


def cost(label: str, found: dict[str, float]) -> list[str]:
    times = [f"{found[key]:.0f}" if key in found else "-" for key in ("fixed_ms", "examined_ms")]
    names = ("weights", "gradients", "state", "saved", "peak")
    return [label, *times, *(f"{found[one] / 1e6:.1f}" if one in found else "-" for one in names)]


def findings(groups: Sequence[Group]) -> str:
    """What the table says about the two questions that the experiment was made for."""
    found = {group.label: group for group in groups}
    lines = []
    if {"dense", "tdlrt 0.5"} <= found.keys():
        worse = difference(found["tdlrt 0.5"], found["dense"])
        verdict = "within" if worse <= WANTED_LOSS else "not within"
        lines.append(
            f"- At half of the linear parameters, tdlrt is {worse:+.3f} bits per character from "
            f"dense: {verdict} the {WANTED_LOSS} that were wanted."
        )
    for share in ("0.5", "0.25", "0.125"):
        if {f"tdlrt {share}", f"matrix {share}"} <= found.keys():
            own, other = found[f"tdlrt {share}"], found[f"matrix {share}"]
            spread = max(own.deviation("bits_per_character"), other.deviation("bits_per_character"))
            gain = -difference(own, other)
            words = "ahead of" if gain > 0 else "behind"
            lines.append(
                f"- At {share} of the parameters, tdlrt is {abs(gain):.3f} bits per character "
                f"{words} factors trained directly; "
                + (
                    f"the larger deviation between seeds is {spread:.3f}."
                    if min(len(own.runs), len(other.runs)) > 1
                    else "with one seed there is no spread to compare this with."
                )
            )
    return "\n".join("\n  ".join(textwrap.wrap(line, 98)) for line in lines)


def difference(one: Group, other: Group) -> float:
    """Bits per character of one row beyond those of another, over the seeds that both have."""
    values = [
        {run.summary["seed"]: run.summary["bits_per_character"] for run in group.runs}
        for group in (one, other)
    ]
    shared = values[0].keys() & values[1].keys()
    return statistics.mean(values[0][seed] - values[1][seed] for seed in shared)


if __name__ == "__main__":
    main()
