"""Scripts that torchrun starts: the one of docs/distributed.md, and Accelerate's."""

import re
import subprocess
from pathlib import Path

import pytest

from integrations.processes import TORCHRUN

DOCUMENT = Path(__file__).parents[2] / "docs/distributed.md"

ACCELERATE = """
import tdlrt, torch
from accelerate import Accelerator
from tdlrt.integrations import distributed
from torch import nn

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(accelerator.process_index)
plain = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))
tdlrt.factorize_(plain, rank=8, init_scale=0.3)
distributed.prepare(plain)
optimizer = tdlrt.TDLRT(plain, torch.optim.SGD, lr=0.05, momentum=0.9, tau=0.2)
model, optimizer = accelerator.prepare(plain, optimizer)
before = plain[0].ranks
for _ in range(20):
    with accelerator.accumulate(model):
        x = torch.randn(8, 12)
        accelerator.backward(nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)))
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
distributed.check_replicas(plain)
assert plain[0].ranks != before
print("done")
"""


def torchrun(script, text):
    script.write_text(text)
    return subprocess.run([*TORCHRUN, script], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_block_of_the_document_runs(tmp_path):
    (block,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    done = torchrun(tmp_path / "script.py", block)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^Tucker layers: .* compression \d", done.stdout, re.M)) == 1


@pytest.mark.slow
def test_accelerate_takes_a_prepared_model(tmp_path):
    done = torchrun(tmp_path / "script.py", ACCELERATE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2
