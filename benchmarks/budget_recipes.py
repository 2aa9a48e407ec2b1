"""How the budget falls and when ranks are frozen: recipes for a budget of a tenth, compared.

    python benchmarks/budget_recipes.py

The networks, data and optimisers of first_epochs.py. Writes benchmarks/results/budget_recipes.json,
run after run (what is there is not run again), and a section of docs/algorithm.md.
"""

import json
import math
import statistics
from itertools import product
from pathlib import Path

import torch

from first_epochs import BATCH, DOCUMENT, EPOCHS, OPTIMIZERS, Row, digits, train
from operations import provenance, table
from tdlrt.ranks import BudgetRecipe, CubicSchedule, LinearSchedule
from tdlrt_lab.documents import fill_section
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text

RESULT = Path(__file__).parent / "results/budget_recipes.json"

BUDGET = 0.1
NETWORKS = ("MLP, 6 layers", "plain CNN, 5 layers", "CNN with batch norm", "LeNet-5")
SEEDS = (0, 1)
RECIPES: dict[str, Row] = {
    "default": {},
    "linear, over the last 75 %": {"ramp_share": 0.75},
    "cubic, over the last 75 %": {"ramp_share": 0.75, "ramp": CubicSchedule},
    "cubic, over the last 50 %": {"ramp_share": 0.5, "ramp": CubicSchedule},
    "linear, over the last 75 %, frozen at 65 %": {"ramp_share": 0.75, "freeze_at": 0.65},
    "cubic, over the last 75 %, frozen at 65 %": {
        **{"ramp_share": 0.75, "freeze_at": 0.65, "ramp": CubicSchedule}
    },
}


def main() -> None:
    torch.set_num_threads(1)
    data = digits()
    result: Row = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {"rows": []}
    rows = result["rows"]
    done = {(row["network"], row["optimizer"], row["recipe"], row["seed"]) for row in rows}
    steps = EPOCHS * math.ceil(len(data[0]) / BATCH)
    for key in product(NETWORKS, OPTIMIZERS, RECIPES, SEEDS):
        if key in done:
            continue
        network, optimizer, name, seed = key
        recipe = BudgetRecipe(BUDGET, steps, **({"ramp": LinearSchedule} | RECIPES[name]))
        accuracies = train(
            *(network, optimizer, seed, data, {}),
            rank_policy=recipe.rank_policy,
            adapt_every=recipe.adapt_every,
            freeze_after=recipe.freeze_after,
        )
        names = dict(zip(("network", "optimizer", "recipe", "seed"), key, strict=True))
        rows.append({**names, "accuracies": accuracies})
        print(rows[-1], flush=True)
        result = {
            **made_by("python benchmarks/budget_recipes.py"),
            "rows": rows,
        }
        write_text(RESULT, json.dumps(result, indent=1) + "\n")
    fill_section(DOCUMENT, "budget_recipes", section(result))


def section(result: Row) -> list[str]:
    """Lines of the section."""
    lines = []
    for recipe in RECIPES:
        cells = []
        for network, optimizer in product(NETWORKS, OPTIMIZERS):
            wanted = {"network": network, "optimizer": optimizer, "recipe": recipe}
            last = [
                row["accuracies"][-1] for row in result["rows"] if wanted.items() <= row.items()
            ]
            cells.append(f"{statistics.mean(last):.1f}" if last else "")
        lines.append([recipe, *cells])
    titles = [f"{network}, {optimizer}" for network, optimizer in product(NETWORKS, OPTIMIZERS)]
    return [
        f"Written by `{result['command']}`: test accuracy (%) at the end, mean of {len(SEEDS)}",
        f"seeds, budget {BUDGET}, on scikit-learn's digits. *Default*: linear, over the last 60 %",
        "of the steps before the freeze, frozen at 50 % of the training, as all that say nothing.",
        "",
        *table(["the budget falls", *titles], lines),
        "",
        *(f"- {fact}" for fact in provenance([result])),
    ]


if __name__ == "__main__":
    main()
