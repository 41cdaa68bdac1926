"""PPO: the experience, the loss and each option against slow restatements in float64; the run around them."""

import copy
import math

import lightning as L
import pytest
import torch
from conftest import EOS, make_tokenizer
from lightning.pytorch.callbacks import ModelCheckpoint
from slow import (
    KL,
    assert_same_bits,
    bits,
    copy_of,
    experience_of,
    gradient_of,
    letters_of,
    moments,
    padded,
    real,
    saved,
    sequences,
    silent,
    slow_entropy,
    slow_rewards,
    slow_scores,
    slow_whitened,
    softmaxes,
    with_garbage,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_rlhf.modules import PPOModule, SFTModule
from lightning_rlhf.modules.ppo import PPOExperience
from lightning_rlhf.modules.rollout import Rollout

# --- slow restatements --------------------------------------------------------------------------------------------


def slow_statistics(module, network, reference, prompt, response):
    """Log-probs, reference log-probs and values of one response, float64 lists."""
    own, hidden = softmaxes(network, module, prompt, response)
    other, _ = softmaxes(reference, module, prompt, response)
    chosen = [own[t, token].item() for t, token in enumerate(response)]
    ref = [other[t, token].item() for t, token in enumerate(response)]
    head = module.value
    values = [(h.double() @ head.weight[0].double() + head.bias[0].double()).item() for h in hidden]
    return chosen, ref, values


def slow_advantages(rewards, values, after, gamma, lam):
    """The double sum of its definition."""
    n = len(rewards)
    following = [*values[1:n], after]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


def slow_experience(module, network, reference, e, scores):
    """(logprobs, values, advantages, returns) as ragged lists, from nothing but ids, networks and scores."""
    h = module.hparams
    rows = sequences(e)
    scores = slow_scores(h, scores, [response for _, response in rows])
    found = [slow_statistics(module, network, reference, *row) for row in rows]
    kls = [[KL[h.kl_estimator](p, r) for p, r in zip(*stats[:2], strict=True)] for stats in found]
    rewards = slow_rewards(scores, kls, h.kl_coef)
    if h.whiten_rewards:
        mean, std = moments(rewards)
        rewards = [[mean + (x - mean) / std for x in row] for row in rewards]
    advantages, returns = [], []
    for (_, response), (_, _, values), row in zip(rows, found, rewards, strict=True):
        after = values[-1] if h.bootstrap_truncated and response[-1] != EOS else 0.0
        advantages.append(slow_advantages(row, values, after, h.gamma, h.gae_lambda))
        returns.append([a + v for a, v in zip(advantages[-1], values, strict=False)])
    if h.whiten_advantages:
        advantages = slow_whitened(advantages)
    logprobs = [stats[0] for stats in found]
    values = [stats[2][:-1] for stats in found]
    return logprobs, values, advantages, returns


def slow_loss(module, e):
    """Mean over the tokens, in loops; differentiable, float64."""
    h, total, count = module.hparams, 0.0, 0
    for i in range(len(e.prompt_ids)):
        prompt, response = real(e.prompt_ids[i], e.prompt_mask[i]), real(e.response_ids[i], e.response_mask[i])
        logs, hidden = softmaxes(module.policy, module, prompt, response)
        values = (module.value.double()(hidden.double()))[:, 0]
        for t, token in enumerate(response):
            advantage = e.advantages[i, t].double()
            ratio = (logs[t, token] - e.logprobs[i, t].double()).exp()
            clipped = ratio.clamp(1 - h.clip_range, 1 + h.clip_range)
            loss = -torch.minimum(ratio * advantage, clipped * advantage)
            old, target = e.values[i, t].double(), e.returns[i, t].double()
            error = (values[t] - target) ** 2
            if h.clip_range_value is not None:
                near = old + (values[t] - old).clamp(-h.clip_range_value, h.clip_range_value)
                error = torch.maximum(error, (near - target) ** 2)
            loss = loss + h.vf_coef * error / 2
            loss = loss - h.entropy_coef * slow_entropy(logs[t])
            total, count = total + loss, count + 1
    return total, count


@pytest.fixture
def fixed(ppo, fit, moved):
    """A module that is away from its reference, and an experience from another policy than its own."""

    def make(**options):
        module = fit(moved(ppo(learning_rate=0.0, **options)))
        e = experience_of(module)
        noise = torch.Generator().manual_seed(11)
        shift = [torch.randn(e.values.shape, generator=noise) for _ in range(4)]
        e = e._replace(
            logprobs=e.logprobs + 0.3 * shift[0],
            values=e.values + 0.3 * shift[1],
            advantages=shift[2],
            returns=e.values + shift[3],
        )
        fields = (f.where(e.response_mask, 0) if f.dtype == torch.float32 else f for f in e)
        return silent(module), PPOExperience(*fields)

    return make


# --- the experience -----------------------------------------------------------------------------------------------

FIRST = [
    {},
    {"lora_r": 4},
    {"temperature": 0.7},
    {"min_new_tokens": 3},
    {"lora_r": 4, "temperature": 0.7, "min_new_tokens": 3, "forward_batch_size": 4},
    {"gradient_checkpointing": True},
]


@pytest.mark.parametrize("pad", ["<eos>", "\7"])
@pytest.mark.parametrize("options", FIRST, ids=str)
def test_first_ratio_is_1(ppo, fit, options, pad):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad
    module = fit(ppo(learning_rate=0.0, tokenizer=tokenizer, max_new_tokens=40, **options))
    e = experience_of(module)
    assert not e.prompt_mask.all()  # left padding
    assert len(set(e.response_mask.sum(1).tolist())) > 1
    metrics = module.trainer.callback_metrics
    torch.testing.assert_close(metrics["policy/ratio"], torch.tensor(1.0))
    torch.testing.assert_close(metrics["policy/approx_kl"], torch.tensor(0.0))
    assert metrics["policy/clip_fraction"] == 0
    for batch in module.experience_dataloader(None):
        again = module.read(module.policy, batch).logprobs[batch.response_mask]
        torch.testing.assert_close(again, batch.logprobs[batch.response_mask])


@pytest.mark.parametrize("options", FIRST, ids=str)
def test_kl_to_the_reference_starts_at_0_and_moves(ppo, fit, options):
    start = fit(ppo(learning_rate=0.0, **options))
    torch.testing.assert_close(torch.tensor(start.samples["kl"]), torch.zeros(6))
    moved = fit(ppo(**options), max_epochs=2)
    assert max(map(abs, moved.samples["kl"])) > 1e-2


def test_kl_of_a_lora_policy_is_to_the_model_without_its_adapter(ppo, fit, policy):
    module = fit(ppo(lora_r=4, learning_rate=0.3), max_epochs=2, max_steps=4)  # the second rollout is moved
    e = experience_of(module)
    network, bare = module.policy, AutoModelForCausalLM.from_pretrained(policy)
    again = fit_again(module, fit)
    e = experience_of(again)
    with torch.no_grad():
        rows = [
            slow_statistics(again, network, bare, real(e.prompt_ids[i], e.prompt_mask[i]),
                            real(e.response_ids[i], e.response_mask[i]))
            for i in range(6)
        ]  # fmt: skip
    expected = torch.tensor([sum(p - r for p, r in zip(*row[:2], strict=True)) for row in rows])
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(torch.tensor(again.samples["kl"]), expected, rtol=1e-4, atol=1e-4)


def fit_again(module, fit):
    """One more rollout, with the policy as it is."""
    module.hparams.learning_rate = 0.0
    module.hparams.value_learning_rate = 0.0
    return fit(module)


def test_statistics_in_chunks_are_those_of_the_whole(ppo, fit, moved):
    whole, chunked = (experience_of(fit(moved(ppo(learning_rate=0.0, forward_batch_size=size)))) for size in (32, 3))
    assert len(set(whole.response_mask.sum(1).tolist())) > 1
    for name in PPOExperience._fields:
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), msg=name)


OPTIONS = [
    {},
    {"kl_coef": 0.5},
    {"kl_estimator": "k2"},
    {"kl_estimator": "k3"},
    {"score_clip": 0.6},
    {"normalize_scores": True},
    {"missing_eos_penalty": 2.0},
    {"whiten_rewards": True},
    {"whiten_advantages": False},
    {"gamma": 0.8},
    {"gae_lambda": 0.5},
    {"gae_lambda": 0.0},
    {"bootstrap_truncated": True},
    {"temperature": 0.7},
    {"min_new_tokens": 2},
    {"max_new_tokens": 4},
    {"rollout_batch_size": 4},
    {
        "normalize_scores": True,
        "score_clip": 0.9,
        "missing_eos_penalty": 0.5,
        "whiten_rewards": True,
        "bootstrap_truncated": True,
        "gamma": 0.9,
        "kl_estimator": "k3",
        "temperature": 1.3,
    },
]


@pytest.fixture(scope="module")
def plain_experience():
    return {}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_experience_equals_its_restatement(ppo, fit, moved, policy, plain_experience, options):
    for seed in range(20):  # the first noise with which some responses end and some do not
        torch.manual_seed(seed)
        module = fit(moved(ppo(learning_rate=0.0, **({"kl_coef": 0.2} | options))))
        e = experience_of(module)
        ended = [EOS in row[mask].tolist() for row, mask in zip(e.response_ids, e.response_mask, strict=True)]
        if True in ended and False in ended:
            break
    assert True in ended
    assert False in ended
    reference = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        expected = slow_experience(module, module.policy, reference, e, letters_of(e))
    for name, rows in zip(["logprobs", "values", "advantages", "returns"], expected, strict=True):
        got = getattr(e, name)
        # float32 with a few dozen operations behind it
        torch.testing.assert_close(got, padded(rows, got.shape[1]), rtol=1e-4, atol=2e-5, msg=lambda m, n=name: n + m)
    if not options:
        plain_experience["e"] = e
    else:
        if "e" not in plain_experience:  # another worker has that test
            test_experience_equals_its_restatement(ppo, fit, moved, policy, plain_experience, {})
        before = plain_experience["e"]
        assert e.advantages.shape != before.advantages.shape or not torch.allclose(
            torch.cat([e.advantages, e.returns]), torch.cat([before.advantages, before.returns]), atol=1e-3
        )


def rollout_of(lengths, ended):
    """A rollout of responses of these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    prompts = torch.ones(len(lengths), 1, dtype=torch.long)
    return Rollout(prompts, prompts.bool(), mask.long(), mask, torch.tensor(ended), mask.float())


def test_scores_are_normalised_by_all_scores_so_far(ppo):
    module = ppo(normalize_scores=True)
    module.sum_over_ranks = lambda x: x
    rollout = rollout_of([1, 1], ended=[True, True])
    torch.testing.assert_close(module.shaped_scores(torch.tensor([1.0, 3.0]), rollout), torch.tensor([-1.0, 1.0]))
    # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    expected = torch.tensor([1.0, 3.0]) / math.sqrt(5)
    torch.testing.assert_close(module.shaped_scores(torch.tensor([5.0, 7.0]), rollout), expected)
    assert module.score_moments == [4.0, 16.0, 84.0]


def test_normalise_then_clip_then_penalise(ppo):
    module = ppo(normalize_scores=True, score_clip=0.5, missing_eos_penalty=2.0, overlong_buffer=4, max_new_tokens=6)
    module.sum_over_ranks = lambda x: x
    rollout = rollout_of([2, 3, 6], ended=[True, False, False])  # past 6 - 4 tokens the penalty grows by 1/4 a token
    scores = module.shaped_scores(torch.tensor([10.0, 30.0, 20.0]), rollout)
    torch.testing.assert_close(scores, torch.tensor([-0.5, 0.5 - 2.0 - 0.25, 0.0 - 2.0 - 1.0]))


def test_adaptive_coefficient_follows_its_closed_form(ppo, fit):
    class Watch(L.Callback):
        seen = []  # noqa: RUF012

        def on_train_epoch_end(self, trainer, module):
            self.seen.append((module.kl_coef, sum(module.samples["kl"]) / 6))

    watch = Watch()
    fit(ppo(kl_coef=0.1, kl_target=0.4, kl_horizon=30), max_epochs=5, callbacks=[watch])
    coefficient = 0.1
    for got, kl in watch.seen:
        coefficient *= 1 + min(max(kl / 0.4 - 1, -0.2), 0.2) * 6 / 30
        assert got == pytest.approx(coefficient, rel=1e-5)
    assert watch.seen[0][0] == pytest.approx(0.1 * (1 - 0.2 * 6 / 30))  # KL is 0 at the start
    assert max(kl for _, kl in watch.seen) > 0.4  # and not always below


def test_the_coefficient_in_force_is_the_one_that_charges(ppo, fit, moved):
    given = experience_of(fit(moved(ppo(learning_rate=0.0, kl_coef=0.7))))
    module = moved(ppo(learning_rate=0.0, kl_coef=0.1))
    module.kl_coef = 0.7
    torch.testing.assert_close(experience_of(fit(module)).returns, given.returns)


def test_fixed_coefficient_stays(ppo, fit):
    assert fit(ppo(kl_coef=0.1), max_epochs=3).kl_coef == 0.1


def test_reported_figures_are_those_of_the_samples(ppo, fit, moved, policy):
    module = fit(moved(ppo(learning_rate=0.0, kl_coef=0.2)))
    e, metrics = experience_of(module), module.trainer.callback_metrics
    reference = AutoModelForCausalLM.from_pretrained(policy)
    kls, k3, entropies, lengths = [], [], [], e.response_mask.sum(1).tolist()
    with torch.no_grad():
        for i in range(6):
            prompt, response = real(e.prompt_ids[i], e.prompt_mask[i]), real(e.response_ids[i], e.response_mask[i])
            own, ref, _ = slow_statistics(module, module.policy, reference, prompt, response)
            kls.append(sum(a - b for a, b in zip(own, ref, strict=True)))
            k3 += [KL["k3"](a, b) for a, b in zip(own, ref, strict=True)]
            logs = softmaxes(module.policy, module, prompt, response)[0]
            entropies += (-(logs.exp() * logs).sum(-1)).tolist()
    expected = {
        "rollout/reward": sum(letters_of(e)) / 6,
        "rollout/reward/letters": sum(letters_of(e)) / 6,
        "rollout/kl": sum(kls) / 6,
        "rollout/kl_k3": sum(k3) / 6,
        "rollout/kl_k3_per_token": sum(k3) / len(k3),
        "rollout/entropy": sum(entropies) / len(entropies),
        "rollout/response_length": sum(lengths) / 6,
        "rollout/eos_rate": sum(r[n - 1].item() == EOS for r, n in zip(e.response_ids, lengths, strict=True)) / 6,
        "policy/kl_coef": 0.2,
    }
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert module.samples["length"] == lengths
    assert module.samples["kl"] == pytest.approx(kls, rel=1e-3, abs=1e-5)
    assert module.samples["prompt"] == ["\1", "\2\3\4\5", "\6\7", "\1\3\3", "\5", "\7\7\2"]
    variance = 1 - (e.returns - e.values)[e.response_mask].var() / e.returns[e.response_mask].var()
    assert metrics["value/explained_variance"].item() == pytest.approx(variance.item(), rel=1e-4)


def test_options_of_sampling_show_in_the_samples(ppo, fit):
    lengths = {
        name: fit(ppo(learning_rate=0.0, **options)).samples["length"]
        for name, options in {
            "plain": {"rollout_batch_size": 48},
            "longest": {"max_new_tokens": 3},
            "least": {"min_new_tokens": 4, "rollout_batch_size": 48},
            "more": {"rollout_batch_size": 8},
        }.items()
    }
    assert max(lengths["longest"]) == 3 < max(lengths["plain"])
    assert min(lengths["least"]) >= 4 > min(lengths["plain"])
    assert len(lengths["more"]) == 8


# --- the loss -----------------------------------------------------------------------------------------------------

LOSSES = [
    {},
    {"clip_range": 0.05},
    {"clip_range_value": None},
    {"clip_range_value": 0.02},
    {"vf_coef": 0.0},
    {"vf_coef": 1.0},
    {"entropy_coef": 0.3},
    {"entropy_coef": 0.3, "min_new_tokens": 2, "temperature": 0.7},
    {"temperature": 0.7},
]


@pytest.fixture(scope="module")
def plain_loss():
    return {}


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_loss_and_gradient_equal_the_restatement(fixed, plain_loss, options):
    module, e = fixed(**options)
    loss = module.training_step(e, 0)
    module.zero_grad()
    loss.backward()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.on_before_optimizer_step(optimizer)
    module.configure_gradient_clipping(optimizer)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    slow = silent(copy_of(module, **options)).double()
    total, count = slow_loss(slow, e)
    assert count == int(e.response_mask.sum())
    assert loss.item() / count == pytest.approx(total.item() / count, rel=1e-5, abs=1e-6)
    (total / count).backward()
    for name, p in slow.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad.float(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
    found = gradients["policy.lm_head.weight"], gradients["value.weight"]
    if not options:
        plain_loss["found"] = found
    else:
        if "found" not in plain_loss:  # another worker has that test
            test_loss_and_gradient_equal_the_restatement(fixed, plain_loss, {})
        assert not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, plain_loss["found"], strict=True))


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.2, "lora_r": 4, "min_new_tokens": 2}], ids=str)
def test_what_lies_under_the_masks_changes_neither_loss_nor_gradient(fixed, options):
    module, e = fixed(**options)
    loss, gradients = gradient_of(module, e)
    dirty = with_garbage(e)
    assert not torch.equal(dirty.prompt_ids[:, 2:], e.prompt_ids)
    again, after = gradient_of(module, dirty)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_accumulation_of_2_by_2_equals_a_minibatch_of_4(ppo, fit, moved, new_gradients, options):
    found = []
    for minibatch, accumulate in [(4, 1), (2, 2), (1, 4)]:
        watch = new_gradients()
        torch.manual_seed(0)  # LoRA's start is random
        module = moved(ppo(learning_rate=0.0, rollout_batch_size=4, minibatch_size=minibatch, **options))
        fit(module, callbacks=[watch], accumulate_grad_batches=accumulate)
        assert len(watch.steps) == 1
        found.append(watch.steps[0])
    assert len(set(module.samples["length"])) > 1
    assert found[0]["value.weight"].abs().max() > 1e-2
    for gradients in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_sees_the_averaged_gradient(ppo, fit, moved, new_gradients, accumulate):
    def norm(clip):
        watch = new_gradients()
        module = moved(ppo(learning_rate=0.0, rollout_batch_size=4, minibatch_size=4 // accumulate))
        fit(module, callbacks=[watch], accumulate_grad_batches=accumulate, gradient_clip_val=clip)
        return torch.stack([g.square().sum() for g in watch.steps[0].values()]).sum().sqrt().item()

    free = norm(None)
    assert norm(1.2 * free) == pytest.approx(free)  # the sum over tokens would be far above
    assert norm(0.5 * free) == pytest.approx(0.5 * free, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_minibatches_of_one_step_share_one_mean(ppo, fit, moved, new_gradients, accumulate):
    """The gradient of a step is that of the mean over all its tokens, at the first update −E[A ∇log π]."""
    watch = new_gradients()
    module = moved(ppo(learning_rate=0.0, rollout_batch_size=4, minibatch_size=4 // accumulate))
    fit(module, callbacks=[watch], accumulate_grad_batches=accumulate)
    slow = silent(copy_of(module)).double()
    total, count = slow_loss(slow, experience_of(module))
    (total / count).backward()
    for name, p in slow.named_parameters():
        torch.testing.assert_close(watch.steps[0][name], p.grad.float(), rtol=1e-4, atol=1e-5)


# --- the update ---------------------------------------------------------------------------------------------------


class Batches(L.Callback):
    """Which responses each training step saw."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append(len(batch.prompt_ids))


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [2] * 3),
        ({"minibatch_size": 3}, [3] * 2),
        ({"num_passes": 3}, [2] * 9),
        ({"rollout_batch_size": 8}, [2] * 4),
    ],
    ids=str,
)
def test_an_epoch_is_num_passes_over_the_minibatches(ppo, fit, options, rows):
    watch = Batches()
    module = fit(ppo(**options), callbacks=[watch])
    assert watch.rows == rows
    assert module.trainer.global_step == len(rows)


@pytest.mark.parametrize(
    ("target", "accumulate", "batches", "steps"),
    [(None, 1, 12, 12), (1e9, 1, 12, 12), (1e-7, 1, 2, 2), (1e-7, 2, 4, 2), (1e-7, 3, 6, 2)],
)
def test_target_kl_ends_the_updates_between_two_steps(ppo, fit, target, accumulate, batches, steps):
    watch = Batches()
    module = ppo(target_kl=target, minibatch_size=1, num_passes=2)
    fit(module, callbacks=[watch], accumulate_grad_batches=accumulate, max_epochs=2)
    assert len(watch.rows) == 2 * batches  # of both iterations: each starts afresh
    assert module.trainer.global_step == 2 * (steps if target == 1e-7 else 12 // accumulate)
    assert module.trainer.current_epoch == 2


def test_value_learning_rate_is_the_values_own(ppo, fit):
    def change(**options):
        module = ppo(weight_decay=0.0, **options)
        module.configure_model()
        before = {k: v.clone() for k, v in module.state_dict().items()}
        fit(module, max_steps=1, max_epochs=-1)
        return {k: (module.state_dict()[k] - v).abs().max().item() for k, v in before.items()}

    # Adam's first step is the learning rate
    both = change(learning_rate=1e-2)
    assert both["value.bias"] == pytest.approx(1e-2, rel=1e-3)
    apart = change(learning_rate=1e-3, value_learning_rate=1e-2)
    assert apart["value.bias"] == pytest.approx(1e-2, rel=1e-3)
    assert apart["policy.lm_head.weight"] == pytest.approx(1e-3, rel=1e-3)
    still = change(learning_rate=1e-2, value_learning_rate=0.0)
    assert still["value.bias"] == 0
    assert still["policy.lm_head.weight"] == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("network", ["policy", "value"])
def test_gradient_checkpointing_changes_no_gradient(ppo, fit, moved, new_gradients, reward_folder, network):
    found = []
    for on in (False, True):
        watch, calls = new_gradients(), []
        options = {"value_model": reward_folder} if network == "value" else {}
        module = moved(ppo(learning_rate=0.0, gradient_checkpointing=on, minibatch_size=6, **options))
        model = module.policy if network == "policy" else module.value.model
        layer = model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        fit(module, callbacks=[watch])
        found.append((watch.steps[0], sum(calls)))
    assert found[0][1] == 1
    assert found[1][1] == 2  # done again in the backward pass
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], gradient)


def test_dtype_narrows_the_policy_and_leaves_the_head(ppo, fit):
    module = fit(ppo(dtype="bfloat16", learning_rate=1e-3))
    assert {p.dtype for p in module.policy.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.value.parameters()} == {torch.float32}
    assert experience_of(module).logprobs.dtype == torch.float32


def test_a_reward_that_counts_a_letter_is_learned(ppo, fit):
    def ones(prompts, responses, **_):
        return [r.count("\1") / 6 for r in responses]

    module = ppo(reward=ones, rollout_batch_size=32, minibatch_size=32, num_passes=2, kl_coef=0.0, learning_rate=3e-2)
    rewards = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            rewards.append(sum(module.samples["reward"]) / 32)

    fit(module, max_epochs=15, callbacks=[Watch()])
    assert rewards[0] < 0.3
    assert rewards[-1] > 0.8


# --- a separate value network -------------------------------------------------------------------------------------


def test_value_model_starts_with_the_scores_of_the_reward_model(ppo, fit, reward_folder):
    module = fit(ppo(value_model=reward_folder, learning_rate=0.0))
    e = experience_of(module)
    scorer = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    scorer.config.pad_token_id = None
    for i in range(6):
        prompt, response = real(e.prompt_ids[i], e.prompt_mask[i]), real(e.response_ids[i], e.response_mask[i])
        for t in range(len(response)):
            with torch.no_grad():
                raw = scorer(torch.tensor([prompt + response[:t]])).logits[0, 0]
            torch.testing.assert_close(e.values[i, t], (raw - 0.75) / 2.5)


def test_value_model_is_trained_apart_from_the_policy(ppo, fit, reward_folder):
    module = ppo(value_model=reward_folder, vf_coef=1.0)
    module.configure_model()
    before = copy.deepcopy(module.value.state_dict())
    fit(module)
    after = module.value.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    names = {id(p): g["name"] for g in module.trainer.optimizers[0].param_groups for p in g["params"]}
    assert {names[id(p)] for p in module.value.parameters()} == {"value"}
    assert {names[id(p)] for p in module.policy.parameters()} == {"policy"}


def test_value_loss_reaches_the_policy_only_through_a_shared_backbone(ppo, fit, moved, reward_folder, new_gradients):
    changed = {}
    for value_model in (None, reward_folder):
        found = []
        for vf_coef in (0.1, 1.0):
            watch = new_gradients()
            module = moved(ppo(learning_rate=0.0, value_model=value_model, vf_coef=vf_coef, minibatch_size=6))
            fit(module, callbacks=[watch])
            found.append(watch.steps[0]["policy.model.layers.0.mlp.up_proj.weight"])
        changed[value_model] = not torch.allclose(*found)
    assert changed == {None: True, reward_folder: False}


# --- frozen networks, checkpoints ---------------------------------------------------------------------------------


def test_reference_and_reward_model_do_not_move_by_a_bit(ppo, fit, reward_folder):
    module = ppo(reward=reward_folder, learning_rate=0.1)
    module.configure_model()
    scorer = module.rewards.to("cpu").terms["reward_model"]._scorer
    with module.reference() as reference:
        before = bits(reference), bits(scorer), bits(module.policy)
    fit(module, max_epochs=2)
    with module.reference() as reference:
        assert_same_bits(bits(reference), before[0])
        assert not any(p.requires_grad for p in reference.parameters())
        frozen = {id(p) for network in (reference, scorer) for p in network.parameters()}
    assert_same_bits(bits(scorer), before[1])
    assert any(not torch.equal(v, before[2][k]) for k, v in bits(module.policy).items())
    trained = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert not trained & frozen
    assert not {id(p) for p in module.parameters()} & frozen
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy", "value"}


def test_the_base_model_under_an_adapter_does_not_move_by_a_bit(ppo, fit, policy):
    module = fit(ppo(lora_r=4, learning_rate=0.1), max_epochs=2)
    base = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    with torch.no_grad(), module.policy.disable_adapter():
        ids = torch.tensor([[1, 2, 3]])
        off = module.policy(ids).logits
        on_again = AutoModelForCausalLM.from_pretrained(policy)(ids).logits
    assert torch.equal(off, on_again)
    names = {n.replace("base_model.model.", "").replace(".base_layer", ""): v for n, v in bits(module.policy).items()}
    assert_same_bits({k: v for k, v in names.items() if "lora" not in k}, base)
    assert all(p.requires_grad == ("lora" in n) for n, p in module.policy.named_parameters())


def test_a_lora_checkpoint_holds_adapters_and_the_value_head_only(ppo, fit, tmp_path):
    names = saved(fit(ppo(lora_r=4)), tmp_path / "a.ckpt")["state_dict"].keys()
    assert all("lora_" in name or name in ("value.weight", "value.bias") for name in names)
    assert len(names) == 2 + 2 * 2 * 7  # A and B of seven linear layers in each of two blocks
    full = saved(fit(ppo()), tmp_path / "b.ckpt")["state_dict"].keys()
    assert {"value.weight", "policy.model.embed_tokens.weight"} <= full
    assert all(name.startswith(("policy.", "value.")) for name in full)


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_a_loaded_checkpoint_is_the_same_policy(ppo, fit, policy, monkeypatch, tmp_path, options, reward_function):
    module = fit(ppo(kl_target=0.5, normalize_scores=True, **options))
    saved(module, tmp_path / "a.ckpt")
    loaded = PPOModule.load_from_checkpoint(tmp_path / "a.ckpt", reward=reward_function, weights_only=True)
    loaded.configure_model()
    assert_same_bits(bits(loaded.policy), bits(module.policy))
    assert_same_bits(bits(loaded.value), bits(module.value))
    assert loaded.kl_coef == module.kl_coef != 0.05
    assert loaded.score_moments == module.score_moments != [0.0, 0.0, 0.0]
    assert loaded.hparams.lora_r == module.hparams.lora_r
    assert list(loaded.rewards.terms) == ["letters"]


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_an_exported_policy_has_the_same_logprobs(ppo, fit, tmp_path, options):
    module = fit(ppo(**options), max_epochs=2)
    module.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("lora" in name for name in loaded.state_dict())
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, module.policy(ids).logits)
    again = ppo(model=str(tmp_path / "out"), learning_rate=0.0)
    fit(again)  # and PPO starts from it


def test_checkpoints_of_other_modules_are_refused(ppo, fit, policy, tmp_path):
    module = fit(ppo(lora_r=4))
    saved(module, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="written by PPOModule and does not fit this SFTModule"):
        fit(SFTModule(policy), [], ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"of its trained tensors are not in the file.*policy.*`lora_r`"):
        fit(ppo(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_r": 4, "value_learning_rate": 1e-3}, {"lr_scheduler": "linear", "warmup_ratio": 0.2, "num_passes": 2}],
    ids=str,
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(ppo, fit, tmp_path, options):
    settings = dict(kl_target=0.2, normalize_scores=True, rollout_batch_size=4, **options)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1, save_weights_only=False)
    whole = fit(ppo(**settings), max_epochs=4, callbacks=[keep], enable_checkpointing=True)
    resumed = fit(ppo(**settings), max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same_bits(bits(resumed), bits(whole))
    assert resumed.kl_coef == whole.kl_coef != 0.05
    assert resumed.score_moments == whole.score_moments
    assert resumed.score_moments[0] == 16
    assert resumed.samples == whole.samples
    assert resumed.trainer.global_step == whole.trainer.global_step


def test_runs_depend_on_the_seed_and_on_nothing_else(ppo, fit):
    def run(seed, draws=0):
        L.seed_everything(seed, verbose=False)
        torch.rand(draws)
        return fit(ppo(), max_epochs=2).samples["response"]

    assert run(1) == run(1, draws=5)
    assert run(1) != run(2)


def test_validation_disturbs_nothing(ppo, fit):
    settings = dict(kl_target=0.2, normalize_scores=True)
    without = fit(ppo(**settings), max_epochs=3)
    watched = fit(ppo(**settings), max_epochs=3, limit_val_batches=1.0, num_sanity_val_steps=-1)
    assert {"val/reward", "val/kl", "val/entropy"} <= watched.trainer.callback_metrics.keys()
    assert_same_bits(
        {k: v for k, v in bits(watched).items() if not k.startswith("_running")},
        {k: v for k, v in bits(without).items() if not k.startswith("_running")},
    )
    assert watched.samples == without.samples
    assert watched.kl_coef == without.kl_coef
    assert watched.score_moments == without.score_moments


def test_validation_meets_the_same_noise_every_time(ppo, make_trainer, new_prompts):
    module = ppo(learning_rate=0.0)
    seen = []
    step = module.validation_step
    module.validation_step = lambda batch, batch_idx: seen.append(step(batch, batch_idx))
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, datamodule=new_prompts())
    assert len(seen) == 4
    assert seen[0] == seen[2]
    assert seen[1] == seen[3]
    assert seen[0]["response"] != module.samples["response"][:2]


def test_predictions_need_no_reward(ppo, make_trainer, new_prompts):
    for reward, columns in [(None, {"prompt", "response"}), (len_of, {"prompt", "response", "reward"})]:
        batches = make_trainer().predict(ppo(reward=reward), datamodule=new_prompts())
        assert [batch["prompt"] for batch in batches] == [["\4", "\3\2\1"], ["\6\6"]]
        assert all(batch.keys() == columns for batch in batches)
    assert batches[0]["reward"] == [float(len(r)) for r in batches[0]["response"]]


def len_of(prompts, responses, **_):
    return [float(len(r)) for r in responses]


def test_columns_of_the_prompts_reach_the_reward(ppo, fit):
    def number_reward(prompts, responses, number):
        return [float(n) for n in number]

    assert fit(ppo(reward=number_reward)).samples["reward"] == [0, 1, 2, 3, 4, 5]


def test_values_without_a_value_model_are_0_before_the_first_update(ppo, fit):
    e = experience_of(fit(ppo(learning_rate=0.0)))
    assert not e.values.any()


def test_statistics_are_0_outside_the_mask(ppo, fit, moved):
    module = fit(moved(ppo(learning_rate=0.0)))
    e = experience_of(module)
    rollout = Rollout(*e[:4], e.response_mask.any(1), e.logprobs)
    for field in module.token_statistics(rollout)[:4]:
        assert not field[~e.response_mask].any()


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minibatch_size": 4}, "`minibatch_size` must divide `rollout_batch_size`: 6 / 4 = 1.5"),
        ({"rollout_batch_size": 0}, "`rollout_batch_size` must be at least 1, but got 0"),
        ({"num_passes": 0}, "`num_passes` must be at least 1"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"min_new_tokens": 7}, "`min_new_tokens` must be 0 to max_new_tokens=6, but got 7"),
        ({"min_new_tokens": -1}, "`min_new_tokens` must be"),
        ({"kl_coef": -0.1}, "`kl_coef` must be at least 0"),
        ({"clip_range": 0.0}, "`clip_range` must be above 0"),
        ({"gamma": 1.1}, "`gamma` must be between 0 and 1"),
        ({"gae_lambda": -0.1}, "`gae_lambda` must be between 0 and 1"),
        ({"dtype": "float64"}, "`dtype` must be one of .*float32"),
        ({"reward_weights": [1.0, 2.0]}, "`reward_weights` must have one weight per reward: 1, but got 2"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_named(ppo, options, message):
    with pytest.raises(ValueError, match=message):
        ppo(**options)


def test_training_without_a_reward_is_refused(ppo, fit):
    with pytest.raises(ValueError, match="`reward` is required to fit"):
        fit(ppo(reward=None))


def test_accumulation_must_divide_a_pass(ppo, fit):
    with pytest.raises(ValueError, match=r"6 / 2 = 3, and 3 / 2 = 1\.5"):
        fit(ppo(num_passes=2), accumulate_grad_batches=2)


def test_a_schedule_needs_an_end(ppo, fit):
    with pytest.raises(ValueError, match="`lr_scheduler=linear` needs to know how long the run is"):
        fit(ppo(lr_scheduler="linear"), max_epochs=-1)
