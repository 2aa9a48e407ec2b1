"""How the budget falls and when ranks are frozen: recipes for a budget of a tenth, compared.

    python benchmarks/budget_recipes.py

The networks, data and optimisers of first_epochs.py. Writes benchmarks/results/budget_recipes.json,
run after run (what is there is not run again), and a section of docs/algorithm.md.
"""

import math
from itertools import product
from pathlib import Path

import torch

from first_epochs import BATCH, DOCUMENT, EPOCHS, OPTIMIZERS, Row, digits, train
from operations import provenance, table
from resumable import accuracy_at_the_end, combinations, measured
from tdlrt.ranks import BudgetRecipe, CubicSchedule, LinearSchedule
from tdlrt_lab.documents import fill_section

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
    steps = EPOCHS * math.ceil(len(data[0]) / BATCH)

    def measure(network: str, optimizer: str, recipe: str, seed: int) -> Row:
        options = {"ramp": LinearSchedule} | RECIPES[recipe]
        parts = BudgetRecipe(BUDGET, steps, **options)
        accuracies = train(
            *(network, optimizer, seed, data, {}),
            rank_policy=parts.rank_policy,
            adapt_every=parts.adapt_every,
            freeze_after=parts.freeze_after,
        )
        return {"accuracies": accuracies}

    runs = combinations(network=NETWORKS, optimizer=OPTIMIZERS, recipe=RECIPES, seed=SEEDS)
    result = measured(RESULT, "python benchmarks/budget_recipes.py", runs, measure)
    fill_section(DOCUMENT, "budget_recipes", section(result))


def section(result: Row) -> list[str]:
    """Lines of the section."""
    lines = [
        [
            recipe,
            *(
                accuracy_at_the_end(
                    result["rows"], network=network, optimizer=optimizer, recipe=recipe
                )
                for network, optimizer in product(NETWORKS, OPTIMIZERS)
            ),
        ]
        for recipe in RECIPES
    ]
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
