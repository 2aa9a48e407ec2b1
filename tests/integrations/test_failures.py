"""A process under torchrun that fails ends the others with an error."""

import re
import subprocess
import time

import pytest

from integrations.processes import TORCHRUN

SCRIPT = """
import os, signal, sys, time
from datetime import timedelta
import torch
from torch import nn
import tdlrt
from tdlrt.integrations import distributed, fsdp

torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=15))
process = torch.distributed.get_rank()
how, engine = sys.argv[1:]
model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
tdlrt.factorize_(model, rank=6)
called = fsdp.fully_shard_(model) if engine == "fsdp" else model
optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, tau=0.1)
if engine == "ddp":
    called, optimizer = distributed.wrap(model, optimizer)
for step in range(10**6):
    if process == 1 and step == 3:
        print("fails at", time.time(), flush=True)
        if how == "raises":
            raise RuntimeError("on purpose")
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
    optimizer.zero_grad()
    called(torch.randn(8, 20)).square().mean().backward()
    optimizer.step()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "engine"), [("raises", "ddp"), ("dies", "ddp"), ("stops", "ddp"), ("dies", "fsdp")]
)
def test_the_others_end_within_a_minute(tmp_path, how, engine):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [*TORCHRUN, script, how, engine], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode != 0
    failed = float(re.findall(r"fails at ([\d.]+)", done.stdout)[0])
    assert time.time() - failed < 60
    assert "Error" in done.stderr
