"""Bytes sent: formulas against numbers worked out by hand, and against what two processes send."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import scaling_worker
from communication_model import (
    FLOPS,
    NETWORK,
    NVLINK,
    bandwidth,
    over_ring,
    padded,
    per_rollout,
    per_step,
    reached_by_gradient,
    tokens_to_hide,
)
from model_shapes import Run, Shape, backbone, in_training
from processes import ranks, run_together
from small_llama import write_models

TINY = Shape(layers=2, hidden=4, heads=2, kv_heads=1, head_dim=2, intermediate=8, vocabulary=10)
# See test_memory_model.py for the counts: 388 parameters and a value head of 5; on 3 ranks 170 and 5 on each.
PPO = Run("ppo", TINY, batch=2, prompt=5, response=4, rollout_batch_size=3, forward_batch_size=2)
FSDP2 = replace(PPO, strategy="fsdp2", ranks=3)


def test_a_ring_passes_all_but_ones_own_part():
    assert over_ring(120, 1) == 0
    assert over_ring(120, 4) == 90


class TestPerStep:
    def test_one_process_sends_nothing(self):
        assert per_step(PPO) == per_rollout(PPO) == {}

    @pytest.mark.parametrize(("ranks", "sent"), [(2, 1572), (4, 2358)])
    def test_ddp_reduces_the_gradients_once(self, ranks, sent):
        # 2 (M − 1) / M · 4 · 393, however many micro-batches.
        assert per_step(replace(PPO, strategy="ddp", ranks=ranks)) == {"all-reduce": sent}
        assert per_step(replace(PPO, strategy="ddp", ranks=ranks, accumulate_grad_batches=3)) == {"all-reduce": sent}

    def test_fsdp2_gathers_twice_and_reduces_each_micro_batch(self):
        # 2 / 3 of 3 · 4 · 175 = 2100.
        assert per_step(FSDP2) == {"gather, forward": 1400, "gather, backward": 1400, "reduce-scatter": 1400}
        assert sum(per_step(FSDP2, gloo=True).values()) == 4 * 1400
        assert sum(per_step(replace(FSDP2, accumulate_grad_batches=2)).values()) == 6 * 1400

    def test_lora_gathers_the_frozen_weights_and_reduces_the_adapters(self):
        # r = 3 on 3 ranks: of A one row each, 4 columns for six of them and 8 for down, 32; of B 2, 1, 1, 2, 3, 3, 2
        # rows of 3 columns, 42. Two blocks 148, the value head 5: 4 · 153 = 612 bytes on a rank, of which 3 · 2/3 are
        # sent. Frozen: 170 of 2 bytes.
        sent = per_step(replace(FSDP2, lora_r=3, dtype="bfloat16"))
        assert sent["reduce-scatter"] == pytest.approx(2 * 612)
        assert sent["gather, forward"] == sent["gather, backward"] == pytest.approx(2 * (612 + 340))

    def test_frozen_first_layers_are_not_gathered_for_the_backward_pass_but_one(self):
        run = replace(FSDP2, shape=replace(TINY, layers=5), lora_r=3, lora_last_layers=2)
        network = backbone(run, trained=True, head=True)
        assert reached_by_gradient(network) == [network[0], *network[3:]]


class TestPerRollout:
    def test_everywhere_the_experience(self):
        # 3 rows of 5 · 9 + 4 · 25 = 145 bytes to each of 2 others.
        assert per_rollout(replace(PPO, strategy="ddp", ranks=3)) == {"experience": 870}

    def test_fsdp2_gathers_the_policy_once_and_the_others_for_each_pass(self):
        # Policy 2 · 4 · 170 = 1360. Passes over 3 rows by 2: 2. Value head 40, reference 1360, reward model (16 + 2 +
        # 136 + 4) · 4 · 2 = 1264.
        expected = {"policy": 1360, "other networks": 2 * (40 + 1360 + 1264), "experience": 870}
        assert per_rollout(FSDP2) == pytest.approx(expected)

    def test_or_the_policy_for_each_token_and_pass(self):
        apart = replace(FSDP2, unshard_rollouts=False)
        assert per_rollout(apart)["policy"] == pytest.approx((4 + 2) * 1360)
        # With LoRA the reference is the policy: another two passes.
        adapted = replace(apart, lora_r=3)
        whole = padded(in_training(adapted)[0], 3)
        assert per_rollout(adapted)["policy"] == pytest.approx((4 + 4) * whole * 2 / 3)


def test_bandwidth_of_nodes():
    assert bandwidth(8) == NVLINK
    assert bandwidth(16) == 8 * NETWORK
    assert bandwidth(16, per_node=1) == NETWORK


def test_tokens_at_which_computing_hides_communication():
    # bfloat16, whole, checkpointing: 3 · 2 bytes against 8 operations per token and parameter.
    run = replace(PPO, dtype="bfloat16", gradient_checkpointing=True)
    assert tokens_to_hide(run, NETWORK) == pytest.approx(6 / NETWORK * FLOPS / 8)
    assert tokens_to_hide(replace(run, lora_r=3), NETWORK) == pytest.approx(4 / NETWORK * FLOPS / 6)


@pytest.mark.slow
def test_two_processes_send_what_the_formulas_say(tmp_path: Path):
    """In one training each: DDP; FSDP2 with a gather per rollout and per token; adapters in the last layer only."""
    shape = Shape(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocabulary=512)
    write_models(shape, tmp_path)
    fields = {"shape": asdict(shape), "prompt": 8, "response": 4, "rollout_batch_size": 16, "forward_batch_size": 8}
    names = ["PPO|ddp|", "PPO|fsdp2|", "PPO, per-token gathers|fsdp2|", "PPO, LoRA, last layer|fsdp2|"]
    script = [sys.executable, scaling_worker.__file__, str(tmp_path), "probe"]
    both = ranks([*script, *[name + json.dumps(fields) for name in names]])
    run_together(*[c for c, _ in both], environments=[e for _, e in both], log_folder=tmp_path / "logs")
    rows = json.loads((tmp_path / "probe-2.json").read_text())
    for row in rows:
        if row["what"] == "sent per step":
            assert row["measured"] == pytest.approx(row["formula"], rel=0.1), row
        elif row["what"] == "sent per rollout":  # and a dozen sums and counts
            assert row["formula"] < row["measured"] < 1.02 * row["formula"] + 10_000, row
        elif not row["what"].startswith("peak"):
            assert row["measured"] == row["formula"], row
    assert sum(row["what"] == "sent per step" for row in rows) == len(names)
