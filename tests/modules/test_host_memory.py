"""Memory of a process: what stays when it is freed, what goes back to the kernel, and what that changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from torch.nn import Module

from lightning_rlhf.modules import PPOModule, SFTModule, host_memory, on_policy, text_module
from lightning_rlhf.modules.backbone import load_causal_lm
from lightning_rlhf.modules.reference import FrozenReference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
FAULTS = """
import ctypes, resource, torch
from lightning_rlhf.modules.host_memory import keep_freed_memory
# What glibc does by itself depends on what was freed before; it begins with mapping all that has 128 KiB.
keep_freed_memory() if {keeps} else ctypes.CDLL(None).mallopt(-3, 2**17)
make_and_drop = lambda: [torch.zeros(2**18) for _ in range(200)]  # of 1 MiB
for _ in range(2):
    make_and_drop()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    make_and_drop()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


PAGES = """
import lightning_rlhf, lightning, torch
tensor, start, end = torch.zeros(2**24), 0, 0  # 64 MiB, in a mapping of its own
for line in open("/proc/self/smaps"):
    first, *flags = line.split()
    if ":" not in first:
        start, end = (int(address, 16) for address in first.split("-"))
    elif first == "VmFlags:" and start <= tensor.data_ptr() < end:
        print("hg" in flags)  # huge pages are welcome
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without them")
@pytest.mark.parametrize(("said", "expected"), [({}, "True"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "False")])
def test_large_tensors_lie_on_large_pages(said, expected):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | said
    done = subprocess.run([sys.executable, "-c", PAGES], env=environment, capture_output=True, check=True, text=True)
    assert done.stdout.split() == [expected]


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


@pytest.fixture
def mapped(tmp_path) -> Module:
    """A policy of 16 bits, whose weights lie in its file."""
    make_llama(vocab_size=5000, hidden_size=256).bfloat16().save_pretrained(tmp_path / "policy")
    return load_causal_lm(str(tmp_path / "policy"), "bfloat16", False)


def lies_in_a_clean_file(weight: torch.Tensor) -> bool:
    return any(start <= weight.data_ptr() < end for start, end in host_memory.clean_weights())


def resident_files() -> int:
    """kB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssFile"].split()[0])


def test_weights_in_a_file_leave_the_process_and_come_back(mapped):
    before = [p.clone() for p in mapped.parameters()]
    resident = resident_files()
    host_memory.let_go_of_files()
    kilobytes = sum(p.nbytes for p in mapped.parameters()) / 1024
    assert resident - resident_files() > 0.8 * kilobytes > 1000
    for p, value in zip(mapped.parameters(), before, strict=True):
        torch.testing.assert_close(p, value, rtol=0, atol=0)


def test_weights_that_were_written_to_stay(mapped):
    weight = mapped.model.norm.weight
    assert lies_in_a_clean_file(weight)
    with torch.no_grad():
        weight.fill_(3)
    assert not lies_in_a_clean_file(weight)
    host_memory.let_go_of_files()
    assert (weight == 3).all()


def test_the_reference_keeps_the_file_and_the_policy_gets_memory(mapped):
    parameters, before = list(mapped.parameters()), [p.clone() for p in mapped.parameters()]
    reference = FrozenReference(mapped).copy
    assert [id(p) for p in mapped.parameters()] == [id(p) for p in parameters]
    assert all(lies_in_a_clean_file(p) for p in reference.parameters())
    assert not any(lies_in_a_clean_file(p) for p in mapped.parameters())
    assert mapped.lm_head.weight.data_ptr() != reference.lm_head.weight.data_ptr()
    for mine, theirs, value in zip(mapped.parameters(), reference.parameters(), before, strict=True):
        torch.testing.assert_close(mine, value, rtol=0, atol=0)
        torch.testing.assert_close(theirs, value, rtol=0, atol=0)
        assert mine.requires_grad
        assert not theirs.requires_grad


@pytest.mark.parametrize("lets_go", [True, False])
def test_frozen_weights_are_let_go_of_by_a_flag(short, fit, monkeypatch, lets_go):
    calls = []
    monkeypatch.setattr(on_policy, "let_go_of_files", lambda: calls.append(1))
    fit(short(PPOModule)(frozen_in_files=lets_go))
    assert bool(calls) == lets_go
