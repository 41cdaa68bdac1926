"""GRPO and its relatives: experience, loss and options against slow restatements in float64; the run around them."""

import math

import lightning as L
import pytest
import slow
import torch
from conftest import EOS, make_llama
from slow import KL, experience_of, letters_of, logged, moved_policy, padded, sequences, silent, slow_logprobs
from transformers import AutoModelForCausalLM

from lightning_rlhf.modules import GRPOModule
from lightning_rlhf.modules.compositions import (
    FixedLengthMean,
    GroupCentered,
    GroupNormalized,
    LeaveOneOut,
    SequenceMean,
    SequenceRatio,
    TokenMean,
    TokenRatio,
    WhitenedGroupScores,
    WhitenedReturns,
)
from lightning_rlhf.modules.experience import TokenStatistics
from lightning_rlhf.modules.rollout import Rollout
from lightning_rlhf.modules.samples import Samples
from lightning_rlhf.modules.scoring import Scores

RLOO = dict(advantage=LeaveOneOut(), aggregation=TokenMean(), kl_in="reward", kl_estimator="k1")


@pytest.fixture
def grpo(short):
    """A GRPOModule with groups of three."""
    return short(GRPOModule, group_size=3)


class Watch(L.Callback):
    """What each iteration sampled and logged, and the rows of each minibatch."""

    def __init__(self):
        self.samples, self.logged, self.rows, self.kl_coefs = [], [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append(len(batch.prompt_ids))

    def on_train_epoch_end(self, trainer, module):
        self.samples.append(module.samples)
        self.logged.append(logged(module))
        self.kl_coefs.append(module.kl_coef)


# --- the experience -----------------------------------------------------------------------------------------------


def slow_experience(module, reference, e, scores):
    """(logprobs, ref_logprobs, advantages) as ragged lists, from nothing but ids, networks and scores."""
    h, rows = module.hparams, sequences(e)
    own = [slow_logprobs(module.policy, module, *row) for row in rows]
    ref = [slow_logprobs(reference, module, *row) for row in rows]
    kls = [[KL[h.kl_estimator](p, r) for p, r in zip(*both, strict=True)] for both in zip(own, ref, strict=True)]
    scores = slow.slow_scores(h, scores, [response for _, response in rows])
    rewards = slow.slow_rewards(scores, kls, h.kl_coef if h.kl_in == "reward" else 0.0)
    return own, ref, slow.ADVANTAGES[type(module.advantage).__name__](rewards, h.group_size)


OPTIONS = [
    {},
    {"advantage": GroupCentered()},
    {"advantage": LeaveOneOut()},
    {"advantage": WhitenedReturns()},
    {"advantage": WhitenedGroupScores()},
    {"kl_in": "reward"},
    {"kl_in": "reward", "kl_estimator": "k2", "advantage": GroupCentered()},
    {"kl_in": "reward", "kl_estimator": "k1", "advantage": WhitenedReturns()},
    RLOO,
    {"group_size": 2},
    {"group_size": 1, "advantage": WhitenedReturns()},
    {"overlong_buffer": 4},
    {"missing_eos_penalty": 2.0},
    {"score_clip": 0.6},
    {"normalize_scores": True, "advantage": GroupCentered()},
    {"temperature": 0.7},
    {"min_new_tokens": 2},
    {"lora_r": 4},
    RLOO
    | {
        "normalize_scores": True,
        "score_clip": 0.9,
        "missing_eos_penalty": 0.5,
        "overlong_buffer": 3,
        "temperature": 1.3,
        "forward_batch_size": 4,
    },
]


def class_name(thing):
    return type(thing).__name__


def shown(options):
    return ", ".join(f"{k}={v if isinstance(v, str | int | float) else class_name(v)}" for k, v in options.items())


def ends_of(module):
    return [response[-1] == EOS for _, response in sequences(experience_of(module))]


def lengths_of(module):
    return [len(response) for _, response in sequences(experience_of(module))]


def run_until(holds, run):
    """The first run, by its noise, of which something holds: else what it tests would be left out."""
    for seed in range(1, 30):
        torch.manual_seed(seed)
        module = run()
        if holds(module):
            return module
    raise AssertionError("in none of 30 runs")


@pytest.fixture(scope="module")
def plain():
    return {}


@pytest.mark.parametrize("options", OPTIONS, ids=shown)
def test_experience_equals_its_restatement(grpo, fit, policy, plain, options):
    settings = dict(learning_rate=0.0, kl_coef=0.2) | options
    module = run_until(lambda module: 0 < sum(ends_of(module)) < 6, lambda: fit(moved_policy(grpo(**settings))))
    e = experience_of(module)
    reference = AutoModelForCausalLM.from_pretrained(policy)
    expected = slow_experience(module, reference, e, letters_of(e))
    assert module.samples["reward"] == letters_of(e)
    for name, rows in zip(["logprobs", "ref_logprobs", "advantages"], expected, strict=True):
        got = getattr(e, name)
        # float32, with a deviation of a few scores in the denominator
        torch.testing.assert_close(got, padded(rows, got.shape[1]), rtol=2e-4, atol=5e-5, msg=lambda m, n=name: n + m)
    assert e.advantages.abs().max() > 0.1
    assert (e.logprobs - e.ref_logprobs).abs().max() > 1e-3
    if not options:
        plain["e"] = e
    else:
        if "e" not in plain:  # another worker has that test
            test_experience_equals_its_restatement(grpo, fit, policy, plain, {})
        assert not torch.allclose(e.advantages, plain["e"].advantages, atol=1e-3)


def test_scoring_reads_no_token_after_the_last_that_is_asked_for(grpo, fit):
    module = fit(grpo(learning_rate=0.0))
    e = experience_of(module)
    rollout = Rollout(*(x[:1] for x in (*e[:4], e.response_mask.any(1), e.logprobs)))
    embedding, read = module.policy.get_input_embeddings(), []
    with embedding.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].numel())):
        module.token_statistics(rollout)
    assert read == [int(e.prompt_mask[0].sum() + e.response_mask[0].sum()) - 1]


def test_relative_advantages_of_the_experience_sum_to_zero_in_each_group(grpo, fit):
    for advantage in (GroupNormalized(), GroupCentered(), LeaveOneOut()):
        e = experience_of(fit(grpo(learning_rate=0.0, advantage=advantage, kl_in="reward")))
        first = e.advantages[:, 0].view(2, 3)
        torch.testing.assert_close(first.sum(1), torch.zeros(2))
        assert first.abs().max() > 0.1


def test_kl_in_the_loss_is_not_in_the_rewards(grpo, fit):
    advantages = [
        experience_of(fit(moved_policy(grpo(learning_rate=0.0, kl_coef=kl_coef, **options)))).advantages
        for options in ({}, {"kl_in": "reward"})
        for kl_coef in (0.0, 1.0)
    ]
    assert torch.equal(advantages[0], advantages[1])
    assert torch.equal(advantages[0], advantages[2])
    assert not torch.allclose(advantages[0], advantages[3], atol=1e-2)


def test_rewards_of_tokens_stay_where_they_were_earned(grpo):
    """By hand: the rest of the total comes at the last token, after clipping; KL is charged at every token."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rollout = Rollout(
        torch.ones(2, 1).long(), torch.ones(2, 1).bool(), mask.long(), mask, torch.tensor([True, True]), mask.float()
    )
    statistics = TokenStatistics(torch.full((2, 3), -1.0) * mask, torch.full((2, 3), -1.5) * mask, *[mask.float()] * 3)
    scores = Scores(torch.tensor([7.0, 1.0]), {}, torch.tensor([[1.0, 0.0, 2.0], [0.0, -3.0, 0.0]]))
    module = grpo(kl_in="reward", kl_estimator="k1", score_clip=2.5)
    found = module.token_rewards(Samples(["a"] * 2, ["b"] * 2, rollout, scores), statistics, kl_coef=0.2)
    # 7 − 3 = 4, cut to 2.5, and 1 + 3 = 4 likewise; KL is 0.5 at a token.
    torch.testing.assert_close(found, torch.tensor([[0.9, -0.1, 2.0 + 2.5 - 0.1], [-0.1, -3.0 + 2.5 - 0.1, 0.0]]))


def test_a_groups_responses_are_to_one_prompt_and_have_noise_of_their_own(grpo, fit):
    for size in (2, 3, 6):
        samples = fit(grpo(learning_rate=0.0, group_size=size)).samples
        prompts = ["\1", "\2\3\4\5", "\6\7"][: 6 // size]
        assert samples["prompt"] == [prompt for prompt in prompts for _ in range(size)]
        assert len(set(samples["response"][:size])) > 1


def test_ppo_takes_groups_too(ppo, fit):
    assert fit(ppo(group_size=3)).samples["prompt"] == ["\1"] * 3 + ["\2\3\4\5"] * 3


def test_columns_of_the_prompts_reach_every_response_of_a_group(grpo, fit):
    def number_reward(prompts, responses, number):
        return [float(n) for n in number]

    assert fit(grpo(reward=number_reward)).samples["reward"] == [0, 0, 0, 1, 1, 1]


FIRST = [
    {},
    {"objective": SequenceRatio()},
    {"lora_r": 4, "temperature": 0.7, "min_new_tokens": 3, "forward_batch_size": 4},
]


@pytest.mark.parametrize("options", FIRST, ids=shown)
def test_first_ratio_is_1(grpo, fit, options):
    module = fit(grpo(learning_rate=0.0, max_new_tokens=20, **options))
    metrics = logged(module)
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["rollout/kl"] == pytest.approx(0.0, abs=1e-5)
    e = experience_of(module)
    assert not e.prompt_mask.all()
    for batch in module.experience_dataloader(None):
        again = module.read(module.policy, batch).logprobs[batch.response_mask]
        torch.testing.assert_close(again, batch.logprobs[batch.response_mask])


# --- the loss -----------------------------------------------------------------------------------------------------

LOSSES = [
    {},
    {"kl_coef": 0.0},
    {"kl_coef": 0.5},
    {"kl_coef": 0.5, "kl_estimator": "k2"},
    {"kl_in": "reward"},
    {"entropy_coef": 0.3},
    {"entropy_coef": 0.3, "min_new_tokens": 2, "temperature": 0.7},
    {"objective": TokenRatio(0.05, 0.4)},
    {"objective": SequenceRatio(0.1, 0.2)},
    {"aggregation": TokenMean()},
    {"aggregation": FixedLengthMean(7)},
    {"aggregation": FixedLengthMean(7), "objective": SequenceRatio(0.3, 0.3), "entropy_coef": 0.1},
]


def slow_loss(module, e):
    """The aggregated loss, in loops; differentiable."""
    h, losses = module.hparams, []
    low, high = module.objective.bounds
    for i, (prompt, response) in enumerate(sequences(e)):
        logs, _ = slow.softmaxes(module.policy, module, prompt, response)
        own = [logs[t, token] for t, token in enumerate(response)]
        log_ratios = [new - e.logprobs[i, t].double() for t, new in enumerate(own)]
        advantages = e.advantages[i, : len(response)].double()
        of_sequence = isinstance(module.objective, SequenceRatio)
        row = slow.slow_clipped(log_ratios, advantages, low, low if high is None else high, of_sequence)
        for t, new in enumerate(own):
            log_r = e.ref_logprobs[i, t].double() - new
            kl = {"k2": log_r**2 / 2, "k3": log_r.exp() - 1 - log_r}[h.kl_estimator]
            row[t] = row[t] + (h.kl_coef * kl if h.kl_in == "loss" else 0) - h.entropy_coef * slow.slow_entropy(logs[t])
        losses.append(row)
    return slow.AGGREGATIONS[type(module.aggregation).__name__](losses)


@pytest.fixture
def fixed(grpo, fit):
    """A module, and an experience that is from another policy than its own and has other advantages than it would."""

    def make(**options):
        module = run_until(
            lambda module: len(set(lengths_of(module))) > 2,
            lambda: fit(moved_policy(grpo(learning_rate=0.0, **options))),
        )
        e, noise = experience_of(module), torch.Generator().manual_seed(11)
        shift = [torch.randn(e.logprobs.shape, generator=noise) for _ in range(3)]
        e = e._replace(
            logprobs=e.logprobs + 0.3 * shift[0], ref_logprobs=e.ref_logprobs + 0.5 * shift[1], advantages=shift[2]
        )
        changed = {name: getattr(e, name).where(e.response_mask, 0.0) for name in e._fields[4:]}
        return silent(module), e._replace(**changed)

    return make


@pytest.fixture(scope="module")
def plain_loss():
    return {}


@pytest.mark.parametrize("options", LOSSES, ids=shown)
def test_loss_and_gradient_equal_the_restatement(fixed, plain_loss, options):
    module, e = fixed(**({"kl_coef": 0.1} | options))
    module.log = lambda name, value, **_: plain_loss.update(logged=value) if name == "train/loss" else None
    _, gradients = slow.gradient_of(module, e)
    double = silent(slow.copy_of(module, **({"kl_coef": 0.1} | options))).double()
    loss = slow_loss(double, e)
    assert plain_loss["logged"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    loss.backward()
    for name, p in double.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad.float(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
    found = gradients["policy.lm_head.weight"]
    assert found.abs().max() > 1e-2
    if not options:
        plain_loss["found"] = found
    else:
        if "found" not in plain_loss:  # another worker has that test
            test_loss_and_gradient_equal_the_restatement(fixed, plain_loss, {})
        assert not torch.allclose(found, plain_loss["found"], atol=1e-4)


@pytest.mark.parametrize("options", [*FIRST, {"aggregation": FixedLengthMean(7), "entropy_coef": 0.2}], ids=shown)
def test_what_lies_under_the_masks_changes_neither_loss_nor_gradient(fixed, options):
    module, e = fixed(**options)
    loss, gradients = slow.gradient_of(module, e)
    dirty = slow.with_garbage(e)
    assert not torch.equal(dirty.prompt_ids[:, 2:], e.prompt_ids)
    again, after = slow.gradient_of(module, dirty)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aggregation", [SequenceMean(), TokenMean(), FixedLengthMean(7)], ids=class_name)
def test_micro_batches_change_no_gradient(grpo, fit, new_gradients, aggregation):
    options = dict(learning_rate=0.0, entropy_coef=0.1, kl_coef=0.3, aggregation=aggregation)
    run_until(lambda module: len(set(lengths_of(module))) > 2, lambda: fit(moved_policy(grpo(**options))))
    seed, found = torch.initial_seed(), []
    for minibatch, accumulate in [(6, 1), (3, 2), (2, 3), (1, 6)]:
        watch = new_gradients()
        torch.manual_seed(seed)
        module = moved_policy(grpo(minibatch_size=minibatch, **options))
        fit(module, callbacks=[watch], accumulate_grad_batches=accumulate)
        assert len(watch.steps) == 1
        found.append((watch.steps[0], logged(module)))
    assert len(set(module.samples["length"])) > 2
    assert found[0][0]["policy.lm_head.weight"].abs().max() > 1e-2
    for gradients, metrics in found[1:]:
        assert metrics == pytest.approx(found[0][1], rel=1e-4, abs=1e-6)
        for name, gradient in found[0][0].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("minibatch", "accumulate", "is_whole"), [(3, 1, True), (6, 1, True), (2, 1, False), (2, 3, True), (1, 2, False)]
)
def test_steps_are_of_whole_groups_where_they_can_be(grpo, fit, minibatch, accumulate, is_whole):
    module = fit(grpo(minibatch_size=minibatch, group_size=3, num_passes=4), accumulate_grad_batches=accumulate)
    rows = [row for batch in module.trainer.train_dataloader.sampler.batches() for row in batch]
    assert len(rows) == 4 * 6
    groups = [{row // 3 for row in rows[i : i + 3]} for i in range(0, len(rows), 3)]
    assert all(len(group) == 1 for group in groups) == is_whole


def test_the_first_step_of_rloo_is_reinforce_with_the_leave_one_out_baseline(grpo, fit, policy, new_gradients):
    """∇ of −1/N Σ_i (R_i − mean of the others' R) Σ_t log π, with R_i = score − β Σ_t KL_t, written as loops."""
    watch = new_gradients()
    module = fit(moved_policy(grpo(learning_rate=0.0, minibatch_size=6, kl_coef=0.3, **RLOO)), callbacks=[watch])
    e, reference = experience_of(module), AutoModelForCausalLM.from_pretrained(policy)
    rows, totals = sequences(e), []
    for row, score in zip(rows, letters_of(e), strict=True):
        own, ref = (slow_logprobs(network, module, *row) for network in (module.policy, reference))
        totals.append(score - 0.3 * sum(p - r for p, r in zip(own, ref, strict=True)))
    double = silent(slow.copy_of(module, **RLOO)).double()
    loss, tokens = 0.0, 0
    for i, (prompt, response) in enumerate(rows):
        others = [totals[j] for j in range(6) if j // 3 == i // 3 and j != i]
        logs, _ = slow.softmaxes(double.policy, module, prompt, response)
        logprob = sum(logs[t, token] for t, token in enumerate(response))
        loss, tokens = loss - (totals[i] - sum(others) / 2) * logprob, tokens + len(response)
    (loss / tokens).backward()
    for name, p in double.named_parameters():
        torch.testing.assert_close(watch.steps[0][name], p.grad.float(), rtol=1e-4, atol=1e-5)


# --- the price of KL, early stopping ------------------------------------------------------------------------------


def test_adaptive_coefficient_follows_its_closed_form(grpo, fit):
    watch = Watch()
    module = fit(grpo(kl_coef=0.1, kl_target=0.2, kl_horizon=30), max_epochs=4, callbacks=[watch])
    coefficient = 0.1
    for got, samples in zip(watch.kl_coefs, watch.samples, strict=True):
        coefficient *= 1 + min(max(sum(samples["kl"]) / 6 / 0.2 - 1, -0.2), 0.2) * 6 / 30
        assert got == pytest.approx(coefficient, rel=1e-5)
    assert logged(module)["policy/kl_coef"] == pytest.approx(coefficient)
    assert len(set(watch.kl_coefs)) == 4


@pytest.mark.parametrize("where", [{"kl_in": "loss"}, {"kl_in": "reward", "advantage": LeaveOneOut()}], ids=shown)
def test_the_coefficient_in_force_is_the_one_that_charges(grpo, fit, new_gradients, where):
    found = []
    for start, now in [(0.7, 0.7), (0.1, 0.7), (0.1, 0.1)]:
        watch, module = new_gradients(), moved_policy(grpo(learning_rate=0.0, kl_coef=start, **where))
        module.kl_coef = now
        fit(module, callbacks=[watch])
        found.append(watch.steps[0]["policy.lm_head.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3)


@pytest.mark.parametrize(
    ("target", "accumulate", "batches", "steps"), [(None, 1, 12, 12), (1e-7, 1, 2, 2), (1e-7, 3, 6, 2)]
)
def test_target_kl_ends_the_updates_between_two_steps(grpo, fit, target, accumulate, batches, steps):
    watch = Watch()
    module = grpo(target_kl=target, minibatch_size=1, num_passes=2)
    fit(module, callbacks=[watch], accumulate_grad_batches=accumulate, max_epochs=2)
    assert watch.rows == [1] * 2 * batches  # of both iterations: each starts afresh
    assert module.trainer.global_step == 2 * steps


def test_num_passes_and_minibatches_make_an_epoch(grpo, fit):
    watch = Watch()
    assert fit(grpo(num_passes=3, minibatch_size=3), callbacks=[watch]).trainer.global_step == 6
    assert watch.rows == [3] * 6


# --- dynamic sampling ---------------------------------------------------------------------------------------------


def only_longer(prompts, responses, **_):
    """Responses to a prompt of one letter are all worth the same."""
    return [len(r) + r.count("\3") / 7 if len(p) > 1 else 1.0 for p, r in zip(prompts, responses, strict=True)]


def surely_longer(prompts, responses, **_):
    """The same, and no two responses to longer prompts tie."""
    return [float(i) if len(prompt) > 1 else 1.0 for i, prompt in enumerate(prompts)]


def only_67(prompts, responses, **_):
    return [len(r) + r.count("\3") / 7 if p == "\6\7" else 1.0 for p, r in zip(prompts, responses, strict=True)]


def constant(prompts, responses, **_):
    return [1.0] * len(prompts)


def groups_of(samples, size=3):
    return samples["prompt"][::size]


def test_only_groups_with_spread_are_learned_from(grpo, fit):
    """Prompts come in the order 1, 2345, 67, 133, 5, 772, again and again, two a round; those of one letter tie."""
    watch = Watch()
    module = grpo(reward=surely_longer, max_sampling_rounds=5, num_passes=1)
    module = fit(module, callbacks=[watch], max_epochs=3)
    assert [groups_of(samples) for samples in watch.samples] == [
        ["\2\3\4\5", "\6\7"],  # of 1, 2345 | 67, 133
        ["\7\7\2", "\2\3\4\5"],  # of 5, 772 | 1, 2345
        ["\6\7", "\1\3\3"],  # of 67, 133
    ]
    assert [metrics["rollout/sampling_rounds"] for metrics in watch.logged] == [2, 2, 1]
    shares = [metrics["rollout/groups_with_spread"] for metrics in watch.logged]
    assert shares == pytest.approx([3 / 4, 2 / 4, 2 / 2])
    e = experience_of(module)
    assert len(e.prompt_ids) == 6
    assert (e.advantages.view(2, -1).abs().amax(1) > 0.1).all()


def test_what_is_learned_from_is_what_was_sampled(grpo, fit, policy):
    module = fit(moved_policy(grpo(learning_rate=0.0, reward=only_longer, max_sampling_rounds=5)))
    e = experience_of(module)
    rows = sequences(e)
    assert ["".join(map(chr, prompt)) for prompt, _ in rows] == module.samples["prompt"]
    assert ["".join(map(chr, response)).rstrip("\0") for _, response in rows] == module.samples["response"]
    scores = only_longer(module.samples["prompt"], module.samples["response"])
    assert module.samples["reward"] == pytest.approx(scores)
    expected = slow_experience(module, AutoModelForCausalLM.from_pretrained(policy), e, scores)
    for got, slowly in zip(e[4:], expected, strict=True):
        torch.testing.assert_close(got, padded(slowly, got.shape[1]), rtol=2e-4, atol=5e-5)


def test_groups_without_spread_fill_up_after_the_last_round(grpo, fit):
    module = fit(grpo(learning_rate=0.0, reward=only_67, max_sampling_rounds=2))
    assert groups_of(module.samples) == ["\6\7", "\1"]
    assert logged(module)["rollout/sampling_rounds"] == 2
    assert logged(module)["rollout/groups_with_spread"] == pytest.approx(1 / 4)
    e = experience_of(module)
    assert e.advantages[:3].abs().max() > 0.1
    assert not e.advantages[3:].any()


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("advantage", [GroupNormalized(), LeaveOneOut(), WhitenedGroupScores()], ids=class_name)
def test_a_reward_that_is_the_same_everywhere_moves_nothing(grpo, fit, gradients, rounds, advantage):
    module = grpo(reward=constant, kl_coef=0.0, max_sampling_rounds=rounds, advantage=advantage)
    module.configure_model()
    before = slow.bits(module.policy)
    fit(module, callbacks=[gradients], max_epochs=2)
    assert all(not gradient.any() for step in gradients.steps for gradient in step.values())
    assert len(gradients.steps) == 6
    slow.assert_same_bits(slow.bits(module.policy), before)
    assert logged(module)["rollout/groups_with_spread"] == 0
    assert logged(module).get("rollout/sampling_rounds", 1) == rounds
    assert len(module.samples["prompt"]) == 6


def test_where_all_groups_have_spread_on_and_off_are_the_same(grpo, fit):
    def varied(prompts, responses, **_):
        return [float(sum(ord(c) * 8**i for i, c in enumerate(r))) for r in responses]

    runs = [fit(grpo(reward=varied, max_sampling_rounds=rounds), max_epochs=2) for rounds in (1, 4)]
    assert all(logged(module)["rollout/groups_with_spread"] == 1 for module in runs)
    assert runs[0].samples == runs[1].samples
    slow.assert_same_bits(slow.bits(runs[0].policy), slow.bits(runs[1].policy))


def test_each_round_and_each_iteration_has_noise_of_its_own(grpo, fit, new_prompts):
    module, seen = grpo(learning_rate=0.0, reward=constant, max_sampling_rounds=3), []
    sample = module.sample_and_score

    def recorded(*args):
        seen.append(sample(*args).responses)
        return sample(*args)

    module.sample_and_score = recorded
    fit(module, new_prompts(("\1",)), max_epochs=2)
    assert len({tuple(responses) for responses in seen}) == len(seen) == 6


def test_scores_count_once_towards_the_running_mean(grpo, fit):
    module = fit(grpo(reward=only_longer, max_sampling_rounds=5, normalize_scores=True), max_epochs=2)
    assert module.score_moments[0] == 12


# --- another reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=shown)
def test_kl_is_to_the_reference_that_is_given(grpo, fit, other_policy, options, new_gradients):
    watches = new_gradients(), new_gradients()
    module = fit(grpo(learning_rate=0.0, kl_coef=0.5, reference=other_policy, **options), callbacks=[watches[0]])
    e, other = experience_of(module), AutoModelForCausalLM.from_pretrained(other_policy)
    expected = []
    for row in sequences(e):
        own, ref = (slow_logprobs(network, module, *row) for network in (module.policy, other))
        expected.append(sum(p - r for p, r in zip(own, ref, strict=True)))
    assert max(map(abs, expected)) > 0.5
    assert module.samples["kl"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    torch.manual_seed(0)
    plain = fit(grpo(learning_rate=0.0, kl_coef=0.5, **options), callbacks=[watches[1]])
    assert plain.samples["kl"] == pytest.approx([0.0] * 6, abs=1e-5)
    name = "q_proj.lora_B.default.weight" if options else "q_proj.weight"
    found = [next(g for key, g in watch.steps[0].items() if key.endswith(name)) for watch in watches]
    assert not torch.allclose(*found, atol=1e-4)


def test_a_reference_that_is_an_object_is_refused(grpo):
    with pytest.raises(ValueError, match="`reference` must be a folder or hub id, but got 'LlamaForCausalLM'"):
        grpo(reference=make_llama())


@pytest.mark.parametrize("given", [False, True])
def test_the_reference_does_not_move_and_is_in_no_checkpoint(grpo, fit, policy, other_policy, given, tmp_path):
    module = fit(grpo(learning_rate=0.1, reference=other_policy if given else None), max_epochs=2)
    expected = AutoModelForCausalLM.from_pretrained(other_policy if given else policy).state_dict()
    with module.reference() as reference:
        slow.assert_same_bits(slow.bits(reference), expected)
        frozen = {id(p) for p in reference.parameters()}
        assert not any(p.requires_grad for p in reference.parameters())
    assert not frozen & {id(p) for p in module.parameters()}
    assert max(map(abs, module.samples["kl"])) > 1e-2
    names = slow.saved(module, tmp_path / "a.ckpt")["state_dict"].keys()
    assert names == {f"policy.{name}" for name, _ in module.policy.named_parameters()}


# --- checkpoints --------------------------------------------------------------------------------------------------

RESUMED = [
    {},
    {"reward": only_longer, "max_sampling_rounds": 4},
    RLOO | {"lora_r": 4, "lr_scheduler": "linear", "num_passes": 2},
]


class SaveAfter(L.Callback):
    """Writes a checkpoint at the end of an epoch."""

    def __init__(self, epochs, path):
        self.epochs, self.path = epochs, path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("within", [False, True], ids=["between iterations", "within one"])
@pytest.mark.parametrize("options", RESUMED, ids=shown)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(grpo, fit, tmp_path, options, within):
    settings = dict(kl_target=0.2, normalize_scores=True, target_kl=10.0, **options)
    steps = 3 * settings.get("num_passes", 1)  # of an iteration
    path = tmp_path / "a.ckpt"
    keep = slow.SaveAt(steps + 2, path) if within else SaveAfter(2, path)
    whole = fit(grpo(**settings), max_epochs=3, callbacks=[keep])
    resumed = fit(grpo(**settings), max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    slow.assert_same_bits(slow.bits(resumed.policy), slow.bits(whole.policy))
    assert resumed.kl_coef == whole.kl_coef != 0.04
    assert resumed.score_moments == whole.score_moments
    assert resumed.samples == whole.samples
    assert logged(resumed) == logged(whole)


def test_an_iteration_that_was_to_end_early_does_so_after_a_stop(grpo, fit, tmp_path):
    """Two of three minibatches take a step: the first does not move the policy before it is measured."""
    settings = dict(target_kl=1e-7)
    whole = fit(grpo(**settings), max_epochs=2, callbacks=[slow.SaveAt(4, tmp_path / "a.ckpt")])
    resumed = fit(grpo(**settings), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.trainer.global_step == whole.trainer.global_step == 4
    slow.assert_same_bits(slow.bits(resumed.policy), slow.bits(whole.policy))


def test_a_run_that_stopped_within_an_iteration_logs_it_whole(grpo, fit, tmp_path):
    settings = dict(reward=only_longer, max_sampling_rounds=4)
    whole = fit(grpo(**settings), max_epochs=2, callbacks=[slow.SaveAt(5, tmp_path / "a.ckpt")])
    resumed = fit(grpo(**settings), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert {"rollout/sampling_rounds", "rollout/groups_with_spread", "rollout/reward"} <= logged(resumed).keys()
    assert logged(resumed) == logged(whole)


def test_objects_are_no_hyperparameters(grpo, fit, tmp_path):
    module = fit(grpo(objective=SequenceRatio(0.1), kl_coef=0.3))
    checkpoint = slow.saved(module, tmp_path / "a.ckpt")
    assert checkpoint["hyper_parameters"].keys() >= {"kl_coef", "group_size", "max_sampling_rounds"}
    assert "objective" not in checkpoint["hyper_parameters"]
    loaded = GRPOModule.load_from_checkpoint(tmp_path / "a.ckpt", objective=module.objective, weights_only=True)
    assert loaded.hparams.kl_coef == 0.3
    assert loaded.objective.bounds == (0.1, 4e-4)


# --- what is refused, what is learned -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "`group_size` must be at least 2, to compare responses, but got 1"),
        ({"group_size": 1, "advantage": LeaveOneOut()}, "`group_size` must be at least 2"),
        (
            {"group_size": 1, "advantage": WhitenedReturns(), "max_sampling_rounds": 2},
            "`group_size` must be at least 2",
        ),
        ({"group_size": 0}, "`group_size` must be at least 1, but got 0"),
        ({"group_size": 4}, r"`group_size` must divide `rollout_batch_size`: 6 / 4 = 1\.5"),
        ({"minibatch_size": 4}, r"`minibatch_size` must divide `rollout_batch_size`: 6 / 4 = 1\.5"),
        ({"kl_estimator": "k1"}, "`kl_estimator` k1 has no gradient in the loss on average"),
        ({"kl_estimator": "k4"}, r"`kl_estimator` must be one of \['k1', 'k2', 'k3'\], but got 'k4'"),
        ({"kl_in": "rewards"}, "`kl_in` must be loss or reward, but got 'rewards'"),
        ({"kl_coef": -0.1}, "`kl_coef` must be at least 0"),
        ({"max_sampling_rounds": 0}, "`max_sampling_rounds` must be at least 1, but got 0"),
        ({"overlong_buffer": 7}, "`overlong_buffer` must be 0 to max_new_tokens=6, but got 7"),
        ({"overlong_buffer": -1}, "`overlong_buffer` must be 0 to max_new_tokens=6, but got -1"),
    ],
    ids=lambda value: shown(value) if isinstance(value, dict) else "",
)
def test_arguments_that_make_no_sense_are_named(grpo, options, message):
    with pytest.raises(ValueError, match=message):
        grpo(**options)


def test_k1_is_fine_where_it_is_not_in_the_loss(grpo):
    grpo(kl_estimator="k1", kl_in="reward")
    grpo(kl_estimator="k1", kl_coef=0.0)


def test_a_reward_that_counts_a_letter_is_learned(grpo, fit):
    def ones(prompts, responses, **_):
        return [r.count("\1") / 6 for r in responses]

    options = dict(rollout_batch_size=32, group_size=8, minibatch_size=32, num_passes=2, kl_coef=0.0)
    watch = Watch()
    fit(grpo(reward=ones, learning_rate=3e-2, **options), max_epochs=12, callbacks=[watch])
    rewards = [sum(samples["reward"]) / 32 for samples in watch.samples]
    assert rewards[0] < 0.3
    assert rewards[-1] > 0.7
    assert math.isfinite(watch.logged[-1]["train/loss"])
