"""Freed memory that stays: page faults of a process that makes and drops large blocks, with and without."""

import subprocess
import sys

import pytest
import torch

from lightning_rlhf.modules import SFTModule, text_module

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
FAULTS = """
import resource, torch
from lightning_rlhf.modules.host_memory import keep_freed_memory
if {keeps}:
    keep_freed_memory()
for _ in range(2):
    torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(2**24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_block_that_was_freed_is_there_for_the_next():
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS.format(keeps=keeps)], capture_output=True, check=True).stdout)
        for keeps in (True, False)
    ]
    assert faults[0] < 0.1 * faults[1]


@pytest.mark.parametrize("keeps", [True, False])
def test_it_is_a_flag(policy, fit, monkeypatch, keeps):
    calls = []
    monkeypatch.setattr(text_module, "keep_freed_memory", lambda: calls.append(1))
    batch = {
        "input_ids": torch.tensor([[1, 2, 3]]),
        "attention_mask": torch.ones(1, 3),
        "loss_mask": torch.ones(1, 3) > 0,
    }
    fit(SFTModule(policy, keep_freed_memory=keeps), [batch])
    assert len(calls) == keeps
