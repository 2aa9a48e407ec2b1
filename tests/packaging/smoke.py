"""Try an installed tdlrt that has torch and safetensors for company; `make package` runs it."""

import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory

EXTRAS = {"typer", "rich", "matplotlib", "datasets", "onnx", "transformers", "lightning"}


def main():
    installed = {dist.metadata["Name"] for dist in distributions()}
    assert not installed & EXTRAS, f"not a clean environment: {sorted(installed & EXTRAS)}"
    seconds = import_seconds()
    assert seconds < 2, f"importing tdlrt takes {seconds:.1f} s of processor time beyond torch"
    with TemporaryDirectory() as folder:
        train_and_reload(Path(folder) / "model.safetensors")
    says_what_is_missing()
    print(f"the wheel works; importing it takes {seconds:.2f} s beyond torch")


def import_seconds():
    import safetensors.torch  # noqa: F401  # brings torch

    before = time.process_time()  # which other processes on the machine do not prolong
    import tdlrt

    assert "site-packages" in tdlrt.__file__, f"not the installed package: {tdlrt.__file__}"
    return time.process_time() - before


def train_and_reload(path):
    import torch
    from torch import nn

    import tdlrt

    def network():
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))

    model = network()
    tdlrt.factorize_(model, rank=0.5)
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.01, momentum=0.9, tau=0.1)
    images = torch.randn(8, 3, 8, 8)
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    tdlrt.save(model, path)
    restored = network()
    tdlrt.load(path, restored)
    torch.testing.assert_close(restored(images), model(images))
    plain = tdlrt.to_plain(model)
    torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)


def says_what_is_missing():
    command = [sys.executable, "-m", "tdlrt", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    assert "pip install 'tdlrt[cli]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


if __name__ == "__main__":
    main()
