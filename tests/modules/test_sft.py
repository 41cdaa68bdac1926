"""Supervised fine-tuning: the loss, accumulation, padding, evaluation, completions, export."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from lightning_rlhf.modules import SFTModule

ROWS = [([1, 2, 3, 4, 0], 2), ([5, 6, 0], 1), ([7, 7, 1, 2, 2, 5, 0], 3), ([3, 0], 1)]  # ids, length of the prompt


def batch(rows, extra=0, garbage=0):
    width = max(len(ids) for ids, _ in rows) + extra
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r, _ in rows])
    return {
        "input_ids": torch.tensor([r + [garbage] * (width - len(r)) for r, _ in rows]),
        "attention_mask": mask,
        "loss_mask": torch.tensor([[n <= t < len(r) for t in range(width)] for r, n in rows]),
    }


@pytest.fixture
def sft(policy):
    def make(**options):
        return SFTModule(policy, **(dict(learning_rate=1e-2, lr_scheduler="constant") | options))

    return make


def slow_nlls(network, rows):
    """Token by token, one row at a time, float64."""
    found = []
    for ids, n in rows:
        logits = network(torch.tensor([ids])).logits[0].double()
        found += [-logits[t - 1].log_softmax(-1)[ids[t]] for t in range(n, len(ids))]
    return found


@pytest.mark.parametrize("extra", [0, 3])
def test_forward_gives_the_nll_of_each_token_that_counts(sft, policy, extra):
    module = sft()
    module.configure_model()
    with torch.no_grad():
        expected = torch.stack(slow_nlls(AutoModelForCausalLM.from_pretrained(policy), ROWS))
        got = module(batch(ROWS, extra, garbage=6))
    assert len(got) == 3 + 2 + 4 + 1
    torch.testing.assert_close(got, expected.float())


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_accumulation_and_padding_change_no_gradient(sft, fit, policy, new_gradients, options):
    ways = [
        ([batch(ROWS)], 1),
        ([batch(ROWS[:2]), batch(ROWS[2:])], 2),
        ([batch([row]) for row in ROWS], 4),
        ([batch(ROWS, extra=4, garbage=5)], 1),
    ]
    found = []
    for batches, accumulate in ways:
        torch.manual_seed(0)
        watch = new_gradients()
        module = fit(sft(**options), batches, callbacks=[watch], accumulate_grad_batches=accumulate)
        assert len(watch.steps) == 1
        found.append(watch.steps[0])
    for gradients in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=5e-6)
    assert max(g.abs().max() for g in found[0].values()) > 1e-2
    if not options:
        slow = AutoModelForCausalLM.from_pretrained(policy)
        torch.stack(slow_nlls(slow, ROWS)).mean().backward()
        for name, p in slow.named_parameters():
            torch.testing.assert_close(found[0]["network." + name], p.grad, rtol=1e-4, atol=1e-6)
    assert module.trainer.global_step == 1


def test_validation_loss_and_perplexity_are_per_token(sft, make_trainer, policy):
    trainer = make_trainer()
    batches = [batch(ROWS[:1]), batch(ROWS[1:])]
    with torch.no_grad():
        nlls = slow_nlls(AutoModelForCausalLM.from_pretrained(policy), ROWS)
    mean = sum(nlls).item() / len(nlls)
    for stage, evaluate in [("val", trainer.validate), ("test", trainer.test)]:
        metrics = evaluate(sft(), torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)[0]
        assert metrics[f"{stage}/loss"] == pytest.approx(mean, rel=1e-5)
        assert metrics[f"{stage}/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_r": 8}], ids=str)
def test_a_tiny_batch_is_learned_by_heart(sft, fit, options):
    module = fit(sft(**options), [batch(ROWS[:3])] * 100)
    with torch.no_grad():
        nll = module(batch(ROWS[:3]))
    assert nll.max() < 0.1


def test_validation_disturbs_nothing(sft, make_trainer):
    ends = []
    for share in (0, 1.0):
        module = sft()
        trainer = make_trainer(max_epochs=3, limit_val_batches=share)
        loaders = [torch.utils.data.DataLoader([batch(ROWS)] * 2, batch_size=None) for _ in range(2)]
        trainer.fit(module, *loaders)
        ends.append({name: p.clone() for name, p in module.named_parameters()})
    assert "val/loss" in trainer.callback_metrics
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_an_exported_model_has_the_same_logits(sft, fit, tmp_path, options):
    module = fit(sft(**options), [batch(ROWS)] * 2)
    module.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(loaded, module.network(ids).logits)
    again = SFTModule(str(tmp_path))
    again.configure_model()
    assert again.tokenizer.decode([1, 2]) == "\1\2"


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_a_loaded_checkpoint_goes_on_bit_for_bit(sft, fit, tmp_path, options):
    settings = dict(lr_scheduler="linear", **options)
    data = [batch(ROWS[:2]), batch(ROWS[2:])]
    torch.manual_seed(0)  # LoRA's start is random
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(sft(**settings), data, max_epochs=4, callbacks=[keep], enable_checkpointing=True)
    torch.manual_seed(1)
    resumed = fit(sft(**settings), data, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.trainer.global_step == whole.trainer.global_step == 8
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name


def test_completions_follow_length_and_temperature(sft, make_trainer, new_prompts):
    def complete(seed=0, **options):
        torch.manual_seed(seed)
        batches = make_trainer().predict(sft(**options), datamodule=new_prompts())
        assert [b["prompt"] for b in batches] == [["\4", "\3\2\1"], ["\6\6"]]
        return [response for b in batches for response in b["response"]]

    assert max(map(len, complete(max_new_tokens=3))) == 3
    assert max(map(len, complete(max_new_tokens=20))) > 3
    assert complete() == complete()
    assert complete() != complete(seed=1)
    cold = {tuple(complete(seed=s, temperature=1e-3, max_new_tokens=6)) for s in range(4)}
    assert len(cold) == 1  # greedy
    assert len({tuple(complete(seed=s, max_new_tokens=6)) for s in range(4)}) > 1
