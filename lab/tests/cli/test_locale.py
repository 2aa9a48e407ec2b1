"""Every command prints what it has to say, also where the locale knows ASCII alone."""

import os
import subprocess
import sys

import pytest

from report_page.runs import write_directory

ENVIRONMENTS = {
    "locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "streams": {"PYTHONIOENCODING": "ascii"},
}
COMPARE = ["compare", "lenet5", "--data", "digits", "--methods", "dense", "--set", "epochs=1"]
COMPARE += ["--set", "batch_size=256", "--seeds", "0,1"]


def tdlrt(name, *words):
    environment = {k: v for k, v in os.environ.items() if k not in ("LANG", "LC_CTYPE")}
    return subprocess.run(
        [sys.executable, "-m", "tdlrt_lab", *map(str, words)],
        capture_output=True,
        env=environment | ENVIRONMENTS[name],
        check=False,
    )


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_report_prints_deviations(name, tmp_path):
    for seed in (0, 1):
        write_directory(tmp_path, f"ä{seed}", method="dense", seed=seed, accuracy=90.0 + seed)
    (tmp_path / "ö.error.json").write_text('{"error": "\\u2192"}')
    done = tdlrt(name, "report", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"drawing lenet5 on digits\n")
    assert rb"| 90.50 \xb1 0.71 |" in done.stdout and rb"\u2192" in done.stdout
    assert "± 0.71" in (tmp_path / "report" / "tables.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "jobs"), [("locale", "2"), ("streams", "1")])
def test_a_comparison_prints_deviations(name, jobs, tmp_path):
    done = tdlrt(name, *COMPARE, "--jobs", jobs, "--out", tmp_path / "ä")
    assert done.returncode == 0, done.stderr
    assert rb" \xb1 " in done.stdout
