"""Operations of an update as torch counts them, bytes of a step of sampling by hand, and the command."""

import sys

import hardware
import pytest
import torch
from hardware import SHAPES, step_bytes, update_flops
from small_llama import llama_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from lightning_rlhf.modules.reading import read, set_fast_paths

TINY = SHAPES["tiny"]


def test_operations_of_linear_layers_are_those_that_torch_counts():
    model = LlamaForCausalLM(llama_config(TINY))
    set_fast_paths(model, padding_free=True, fused_logprobs=True, fused_layers=True)
    ids = torch.randint(1, 256, (3, 12))
    where = torch.arange(12).expand_as(ids) >= 5
    with FlopCounterMode(display=False) as counter:
        read(model, ids, torch.ones_like(ids), where).logprobs.sum().backward()
    attention = 6 * 3 * 11 * TINY.layers * TINY.queries * 11
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert counted == update_flops(TINY, 3, 5, 7) - attention


def test_attention_is_half_of_two_products():
    """By hand: 2 layers with queries of 64, over 1 token, and over 2."""
    per_token, head = 6 * TINY.layers * sum(n * k for n, k in TINY.linears), 6 * 256 * 64
    assert update_flops(TINY, 1, 1, 1) == per_token + 6 * 2 * 64 * 1 + head
    assert update_flops(TINY, 1, 1, 2) == 2 * (per_token + 6 * 2 * 64 * 2 + head)


def test_a_step_reads_weights_and_cache():
    """By hand: 2 blocks of 64·64·2 + 32·64·2 + 3·64·128 and two norms, the embedding, a norm; 2 bytes each."""
    weights = 2 * (2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128 + 128) + 256 * 64 + 64)
    assert step_bytes(TINY, 3, 10) == weights + 3 * 10 * 2 * (2 * 32) * 2


def test_the_command_prints_both(monkeypatch, capsys):
    flags = "--shape tiny --flops 1e11 --bandwidth 1e10 --batch 2 --rows 3 --prompt 4 --response 5 --repetitions 1"
    monkeypatch.setattr(sys, "argv", ["hardware.py", *flags.split()])
    hardware.main()
    update, sampling = capsys.readouterr().out.splitlines()[2:4]
    assert update.startswith("| update | 2 x 9 |")
    assert sampling.startswith("| sampling | 3 x 5 |")
    for line in (update, sampling):
        assert 0 < float(line.rsplit("|", 2)[1].strip(" %")) < 100


def test_shares_are_per_cent():
    assert hardware.share(30.0, 60.0) == "50.0%"
    assert update_flops(SHAPES["Llama-3.2-1B"], 1, 1, 1000) == pytest.approx(6 * 1000 * 1.236e9, rel=0.05)
