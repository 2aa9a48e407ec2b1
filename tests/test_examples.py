"""The examples run as they stand and reach the accuracy that they are worth showing for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["plain_torch", "huggingface_resnet", "huggingface_vit", "lightning_module", "accelerate_loop"],
)
def test_example_runs(name, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = re.findall(r"^Tucker layers: .* compression (-?[\d.]+)%$", done.stdout, re.M)
    assert float(after) > max(60.0, float(before))
    accuracy = re.search(r"^test accuracy ([\d.]+)%$", done.stdout, re.M)
    assert accuracy, done.stdout
    assert float(accuracy[1]) > 90
    assert not [*tmp_path.iterdir()]


def test_every_example_is_run():
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"digits"}
    (parametrized,) = [m for m in test_example_runs.pytestmark if m.name == "parametrize"]
    assert set(parametrized.args[1]) == names
