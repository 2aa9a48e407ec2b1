"""Try the lab as the extra `cli` of an installed tdlrt brings it; `make package` runs it."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import tdlrt_lab


def main():
    assert "site-packages" in tdlrt_lab.__file__, f"not the installed package: {tdlrt_lab.__file__}"
    tdlrt("doctor")
    with TemporaryDirectory() as folder:
        sweep = Path(folder) / "sweep"
        run, report = sweep / "run", sweep / "report"
        tdlrt("train", "lenet5", "--data", "digits", "--epochs", "1", "--quiet", "--out", run)
        assert json.loads((run / "summary.json").read_text())["epochs"] == 1
        tdlrt("report", sweep)
        assert (report / "index.html").exists()
    print("the wheel of the lab works: doctor, train, report")


def tdlrt(*words):
    command = [Path(sys.executable).parent / "tdlrt", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main()
