"""What the comparisons of docs/results.md say: who is above whom, and how far below dense."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence

from scipy.stats import ttest_ind_from_stats

from comparisons import Result, as_runs
from tdlrt_lab.methods import METHODS
from tdlrt_lab.reports.groups import repetitions
from tdlrt_lab.spread import format_spread

LEVEL = 0.05
NEAR = 0.2
DIRECT = ("tucker", "matrix", "structured")
MASKS = ("magnitude", "snip", "grasp")
CIFAR_HEAD = ("network", "epochs", "compression (%)", "seeds", "tdlrt (%)", "dense")

TEXT = """\
## What the comparisons say

### Equal sizes, MNIST

Mean accuracies (%). A method stands under *above* or *below* if its accuracy differs from that of
tdlrt with p < {level} (Welch's t-test, one-sided, for every method by itself), and otherwise under
*level*; with fewer than two seeds it is not tested.

{mnist}

{bounds}

Methods with masks are above tdlrt at small sizes because of what a size counts. 400,000 of the
{dense} weights of LeNet-5's factorised layers are those of one linear layer, 800 x 500. A direction
of this layer costs 1,300 parameters, and the smallest size leaves tdlrt rank {rank}; a mask keeps
as many single weights as a size allows, wherever they are worth most. The positions of these
weights are not counted, and the network does all the multiply-adds of the dense one.

With this layer as a tensor of 20 x 25 x 50 x 4 x 4 (`reshape`), whose directions cost less, tdlrt
has at these sizes (accuracies in %; *masks* is the best of {masks}):

{tensors}

### CIFAR-10

The table shows the accuracy of tdlrt, and by how many points it is above the best dense row and
above other networks of the same size that are trained directly (rows within one point of its
compression), all after the same number of epochs. *tucker* and *matrix* train factors, and
*structured* a narrow dense network: it cuts the channels of all layers after the first step.

{cifar}

For tucker and matrix the best of the learning rates with which they were run counts; for each
network a table below compares these rates on held-out images.

Rows of tdlrt that reach the accuracy of the dense network within these epochs, so that there is a
time to it: {reached}.
"""


def findings(results: Mapping[str, Sequence[Result]]) -> str:
    """The section, of the experiments by name; nothing without those that it is about."""
    mnist = results.get("mnist_methods", ())
    sizes = [*mnist, *results.get("mnist_budget", ())]
    ours = [result for result in mnist if result["method"] == "tdlrt"]
    if not ours or not any(result["method"] == "dense" for result in mnist):
        return ""
    smallest = min(ours, key=lambda result: result["parameters"])
    names = (
        "cifar10_rescnn",
        "cifar10_rescnn_long",
        "cifar10_rescnn_30",
        "cifar10_vgg16",
        "cifar10_vgg16_40",
    )
    cifar = [line for name in names for line in against(results.get(name, ()))]
    return TEXT.format(
        level=LEVEL,
        mnist=equal_sizes(mnist),
        bounds=bounds(sizes),
        masks=", ".join(MASKS),
        tensors=as_tensor(
            [*mnist, *results.get("mnist_budget", ())], results.get("mnist_reshape", ())
        ),
        dense=f"{smallest['dense_parameters']:,}",
        rank=smallest["ranks"]["fc1"][0],
        cifar=markdown([*CIFAR_HEAD, *DIRECT], cifar),
        reached=", ".join(f"{line[0]} at {line[2]} %" for line in cifar if line[5][0] == "+")
        or "none",
    )


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def accuracies(results: Sequence[Result], method: str, budget: float | None) -> list[float]:
    return [
        result["accuracy"]
        for result in results
        if result["method"] == method and result["config"].get("budget") == budget
    ]


def place(other: Sequence[float], own: Sequence[float]) -> str:
    """Whether the accuracies of another method are above one's own, below, or level with them."""
    if len(other) < 2 or len(own) < 2:
        return "level"
    for name, alternative in (("above", "greater"), ("below", "less")):
        test = ttest_ind_from_stats(
            *moments(other), *moments(own), equal_var=False, alternative=alternative
        )
        if test.pvalue < LEVEL:
            return name
    return "level"


def moments(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, standard deviation and number."""
    return statistics.mean(values), statistics.stdev(values), len(values)


def equal_sizes(results: Sequence[Result]) -> str:
    """A line per size: tdlrt, its spread next to that of tucker, and where the others are."""
    dense = accuracies(results, "dense", None)
    sizes = {r["config"].get("budget") for r in results if r["method"] == "tdlrt"}
    lines = []
    for size in sorted(sizes, reverse=True):
        own = accuracies(results, "tdlrt", size)
        found: dict[str, list[str]] = {"above": [], "level": [], "below": []}
        for method in METHODS:
            other = dense if method == "dense" else accuracies(results, method, size)
            if other and method != "tdlrt":
                found[place(other, own)].append(f"{method} {statistics.mean(other):.2f}")
        spread = format_spread(accuracies(results, "tucker", size), 2)
        cells = [f"{100 * (1 - size):g}", str(len(own)), format_spread(own, 2), spread]
        lines.append([*cells, *(", ".join(names) or "-" for names in found.values())])
    head = ["compression (%)", "seeds", "tdlrt (%)", "tucker (%)", "above", "level", "below"]
    return markdown(head, lines)


def as_tensor(results: Sequence[Result], reshaped: Sequence[Result]) -> str:
    """A line per size: tdlrt with a linear layer as a matrix, as a tensor, and the best mask."""
    split = [r for r in reshaped if (r["config"]["reshape"] or "").startswith("fc1=20x25:")]
    lines = []
    for size in sorted({r["config"]["budget"] for r in split}, reverse=True):
        own = [accuracies(of, "tdlrt", size) for of in (results, split)]
        masks = [accuracies(results, method, size) for method in MASKS]
        best = max(masks, key=lambda values: statistics.mean(values) if values else 0.0)
        cells = [f"{len(v)}: {format_spread(v, 2)}" if v else "-" for v in (*own, best)]
        lines.append([f"{100 * (1 - size):g}", *cells])
    head = ["compression (%)", "seeds: matrix", "seeds: tensor", "seeds: masks"]
    return markdown(head, lines)


def bounds(results: Sequence[Result]) -> str:
    """The largest compressions at which tdlrt is as good as dense, and nearly."""
    groups: dict[float, list[Result]] = {}
    for result in results:
        if result["method"] == "tdlrt":
            groups.setdefault(result["config"]["budget"], []).append(result)
    dense = statistics.mean(r["accuracy"] for r in results if r["method"] == "dense")
    lines = []
    for text, least in (("at or above", dense), (f"within {NEAR} points of", dense - NEAR)):
        fits = [
            (mean(group, "compression"), len(group), mean(group, "accuracy"))
            for group in groups.values()
            if mean(group, "accuracy") >= least
        ]
        compression, runs, accuracy = max(fits, default=(0.0, 0, dense))
        lines.append(
            f"- Largest compression with a mean accuracy {text} that of dense, {dense:.2f} %: "
            f"{100 * compression:.1f} %, with {accuracy:.2f} % in {runs} runs."
        )
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in lines)


def mean(group: Sequence[Result], name: str) -> float:
    return statistics.mean(result[name] for result in group)


def above_best(own: float, others: Sequence[float]) -> str:
    """By how much an accuracy is above the best of others, if there are any."""
    return f"{own - max(others):+.2f}" if others else "-"


def against(results: Sequence[Result]) -> list[list[str]]:
    """A line per size of tdlrt: distances to dense and to small networks trained directly."""
    groups: dict[str, list[list[Result]]] = {}
    for runs in repetitions(as_runs(results)):
        group = [run.summary for run in runs]
        groups.setdefault(group[0]["method"], []).append(group)
    dense = [mean(group, "accuracy") for group in groups.get("dense", ())]
    lines = []
    for group in groups.get("tdlrt", ()):
        own, size = mean(group, "accuracy"), mean(group, "compression")
        cells = [group[0]["model"], str(group[0]["epochs"]), f"{100 * size:.1f}"]
        cells += [str(len(group)), f"{own:.2f}", above_best(own, dense)]
        for name in DIRECT:
            others = [
                mean(other, "accuracy")
                for other in groups.get(name, ())
                if abs(mean(other, "compression") - size) < 0.01
            ]
            cells.append(above_best(own, others))
        lines.append(cells)
    return sorted(lines)
