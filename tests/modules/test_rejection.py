"""Rejection sampling: what is picked, what is learned from it, and best-of-n without learning."""

import math

import lightning as L
import pytest
import slow
import torch
from slow import experience_of, letters_of, logged, moved_policy, sequences, silent
from transformers import AutoModelForCausalLM

from lightning_rlhf.modules import BestOfNModule, RFTModule
from lightning_rlhf.modules.rejection import best_rows


@pytest.fixture
def rft(short):
    """An RFTModule that learns from the best of four responses to each of three prompts."""
    return short(RFTModule, rollout_batch_size=12, minibatch_size=1)


@pytest.fixture
def best_of_n(policy, reward_function):
    """A BestOfNModule that picks from four."""
    return lambda **options: BestOfNModule(
        **(dict(model=policy, reward=reward_function, n=4, max_new_tokens=6) | options)
    )


class Responses(L.Callback):
    """What each iteration sampled."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, module):
        self.seen.append(module.samples["response"])


def test_best_rows_are_the_first_of_the_highest():
    assert best_rows(torch.tensor([0.0, 2.0, 2.0, 5.0, 1.0, 5.0]), 3) == [1, 3]
    assert best_rows(torch.tensor([-1.0, -1.0, -3.0, -2.0]), 2) == [0, 3]
    assert best_rows(torch.tensor([1.0, 4.0, 3.0, 2.0]), 4) == [1]


# --- rejection-sampling fine-tuning -------------------------------------------------------------------------------


def test_the_best_of_each_group_are_learned(rft, fit):
    module = fit(rft(learning_rate=0.0))
    samples, e = module.samples, experience_of(module)
    assert samples["prompt"] == ["\1"] * 4 + ["\2\3\4\5"] * 4 + ["\6\7"] * 4
    best = [max(range(start, start + 4), key=lambda i: samples["reward"][i]) for start in (0, 4, 8)]
    assert best != [0, 4, 8]
    rows = sequences(e)
    assert ["".join(map(chr, prompt)) for prompt, _ in rows] == ["\1", "\2\3\4\5", "\6\7"]
    assert ["".join(map(chr, response)).rstrip("\0") for _, response in rows] == [samples["response"][i] for i in best]
    assert letters_of(e) == [samples["reward"][i] for i in best]
    expected = sum(samples["reward"][i] for i in best) / 3
    lengths = [samples["length"][i] for i in best]
    assert sum(lengths) / 3 != sum(samples["length"]) / 12
    assert logged(module)["rollout/best_length"] == pytest.approx(sum(lengths) / 3)
    spread = [len(set(samples["reward"][start : start + 4])) > 1 for start in (0, 4, 8)]
    assert logged(module)["rollout/groups_with_spread"] == pytest.approx(sum(spread) / 3)
    assert logged(module)["rollout/best_reward"] == pytest.approx(expected)
    assert logged(module)["rollout/reward"] == pytest.approx(sum(samples["reward"]) / 12)
    assert expected > sum(samples["reward"]) / 12


def test_shaped_scores_pick(rft, fit):
    """A penalty above all rewards for what did not end leaves only what did, where something did."""
    for seed in range(1, 20):
        torch.manual_seed(seed)
        plain, penal = (fit(rft(learning_rate=0.0, missing_eos_penalty=p)) for p in (0.0, 1000.0))
        assert plain.samples == penal.samples
        ended = penal.samples["ended"]
        picked = [[response[-1] == 0 for _, response in sequences(experience_of(module))] for module in (plain, penal)]
        assert picked[1] == [any(ended[start : start + 4]) for start in (0, 4, 8)]
        if picked[0] != picked[1]:
            return
    raise AssertionError("the penalty changed nothing in 20 runs")


def slow_nll(module, e):
    """Mean over the tokens of all responses; differentiable."""
    losses = []
    for prompt, response in sequences(e):
        logs, _ = slow.softmaxes(module.policy, module, prompt, response)
        losses += [-logs[t, token] for t, token in enumerate(response)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "min_new_tokens": 2}], ids=str)
def test_loss_and_gradient_are_those_of_the_likelihood(rft, fit, new_gradients, options):
    found = []
    for minibatch, accumulate in [(3, 1), (1, 3)]:
        watch = new_gradients()
        module = moved_policy(rft(learning_rate=0.0, minibatch_size=minibatch, **options))
        fit(module, callbacks=[watch], accumulate_grad_batches=accumulate)
        assert len(watch.steps) == 1
        found.append((watch.steps[0], logged(module)["train/loss"]))
    e = experience_of(module)
    double = silent(slow.copy_of(module, **options)).double()
    loss = slow_nll(double, e)
    loss.backward()
    for gradients, value in found:
        assert value == pytest.approx(loss.item(), rel=1e-5)
        for name, p in double.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad.float(), rtol=1e-4, atol=1e-5)
    assert found[0][0]["policy.lm_head.weight"].abs().max() > 1e-2


def test_what_lies_under_the_masks_changes_neither_loss_nor_gradient(rft, fit):
    module = fit(moved_policy(rft(learning_rate=0.0)))
    e = experience_of(module)
    module = silent(module)
    loss, gradients = slow.gradient_of(module, e)
    again, after = slow.gradient_of(module, slow.with_garbage(e))
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}], ids=str)
def test_samples_of_the_reference_stay_those_of_the_starting_policy(rft, fit, options):
    found = {}
    for from_reference in (True, False):
        for learning_rate in (0.0, 0.1):
            watch = Responses()
            settings = dict(learning_rate=learning_rate, from_reference=from_reference, **options)
            found[from_reference, learning_rate] = fit(rft(**settings), max_epochs=3, callbacks=[watch]), watch.seen
    responses = {key: seen for key, (_, seen) in found.items()}
    assert responses[True, 0.1] == responses[True, 0.0] == responses[False, 0.0]
    assert responses[False, 0.1] != responses[False, 0.0]
    assert responses[False, 0.1][0] == responses[False, 0.0][0]
    moved = found[True, 0.1][0]
    assert max(map(abs, moved.samples["kl"])) > 1e-2  # it did move


def test_samples_of_a_reference_that_is_given_are_its_own(rft, fit, other_policy):
    own = fit(rft(learning_rate=0.0, reference=other_policy)).samples
    theirs = fit(rft(learning_rate=0.0, reference=other_policy, from_reference=True)).samples
    expected = fit(rft(learning_rate=0.0, model=other_policy)).samples
    assert theirs["response"] == expected["response"] != own["response"]


def test_evaluation_samples_from_the_policy(rft, fit):
    found = {}
    for learning_rate in (0.0, 0.1):
        module, seen = rft(learning_rate=learning_rate, from_reference=True), []
        step = module.validation_step
        module.validation_step = lambda *batch, step=step, seen=seen: seen.append(step(*batch))
        fit(module, limit_val_batches=1.0)
        found[learning_rate] = [columns["response"] for columns in seen]
        assert (abs(logged(module)["val/kl"]) > 1e-2) == (learning_rate > 0)
    assert found[0.1] != found[0.0]


def test_only_the_policy_is_in_a_checkpoint(rft, fit, policy, tmp_path):
    module = fit(rft(from_reference=True, learning_rate=0.1), max_epochs=2)
    with module.reference() as reference:
        slow.assert_same_bits(slow.bits(reference), AutoModelForCausalLM.from_pretrained(policy).state_dict())
    names = slow.saved(module, tmp_path / "a.ckpt")["state_dict"].keys()
    assert names == {f"policy.{name}" for name, _ in module.policy.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"lora_r": 4, "from_reference": True}], ids=str)
@pytest.mark.parametrize("step", [3, 5], ids=["between iterations", "within one"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(rft, fit, tmp_path, options, step):
    whole = fit(rft(**options), max_epochs=3, callbacks=[slow.SaveAt(step, tmp_path / "a.ckpt")])
    resumed = fit(rft(**options), max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    slow.assert_same_bits(slow.bits(resumed.policy), slow.bits(whole.policy))
    assert resumed.samples == whole.samples
    assert logged(resumed) == logged(whole)


def test_rewards_rise(rft, fit):
    def ones(prompts, responses, **_):
        return [r.count("\1") / 6 for r in responses]

    module = rft(reward=ones, rollout_batch_size=64, minibatch_size=16, learning_rate=2e-2)
    start = fit(rft(reward=ones, rollout_batch_size=64, minibatch_size=16, learning_rate=0.0))
    fit(module, max_epochs=8)
    assert sum(start.samples["reward"]) / 64 < 0.3
    assert sum(module.samples["reward"]) / 64 > 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "`group_size` must be at least 2, to pick the best of, but got 1"),
        ({"group_size": 5}, r"`group_size` must divide `rollout_batch_size`: 12 / 5 = 2\.4"),
        ({"minibatch_size": 2}, r"`minibatch_size` must divide `rollout_batch_size / group_size`: 3 / 2 = 1\.5"),
        ({"minibatch_size": 12}, r"`minibatch_size` must divide `rollout_batch_size / group_size`: 3 / 12 = 0\.25"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_named(rft, options, message):
    with pytest.raises(ValueError, match=message):
        rft(**options)


def test_accumulation_must_divide_a_pass(rft, fit):
    message = r"rollout_batch_size / group_size / minibatch_size = 3 / 1 = 3, and 3 / 2 = 1\.5"
    with pytest.raises(ValueError, match=message):
        fit(rft(), accumulate_grad_batches=2)


# --- best of n ----------------------------------------------------------------------------------------------------


def evaluated(make_trainer, new_prompts, module, what="validate"):
    """The columns of the held-out prompts, and what was logged."""
    seen = []
    step = module.validation_step if what == "validate" else module.test_step
    setattr(module, step.__name__, lambda batch, batch_idx: seen.append(step(batch, batch_idx)))
    metrics = getattr(make_trainer(), what)(module, datamodule=new_prompts(), verbose=False)[0]
    return {name: [x for columns in seen for x in columns[name]] for name in seen[0]}, metrics


def test_the_answer_is_the_best_of_n(best_of_n, make_trainer, new_prompts, reward_function):
    """Row i of the data has the noise of rows i · n to i · n + n − 1."""
    module = best_of_n()
    columns, metrics = evaluated(make_trainer, new_prompts, module)
    prompts = ["\4", "\3\2\1", "\6\6"]
    assert columns["prompt"] == prompts
    expected, firsts = [], []
    for i, prompt in enumerate(prompts):
        batch = new_prompts.batch([prompt] * 4)
        rollout = module.roll_out(batch, range(4 * i, 4 * i + 4), -1)
        responses = module.score(rollout, batch).responses
        rewards = reward_function(batch["prompts"], responses)
        assert len(set(responses)) > 1
        expected.append(max(zip(rewards, responses, strict=True), key=lambda pair: pair[0]))
        firsts.append(rewards[0])
    assert columns["reward"] == [reward for reward, _ in expected]
    assert columns["response"] == [response for _, response in expected]
    assert all(best >= first for best, first in zip(columns["reward"], firsts, strict=True))
    assert columns["reward"] != firsts
    assert metrics["val/reward"] == pytest.approx(sum(columns["reward"]) / 3)


def test_n_changes_the_answers_and_the_bound(best_of_n, make_trainer, new_prompts):
    rewards = {}
    for n in (2, 32):
        columns, metrics = evaluated(make_trainer, new_prompts, best_of_n(n=n))
        assert metrics["val/kl_bound"] == pytest.approx(math.log(n) - (n - 1) / n)
        assert metrics["val/kl"] == pytest.approx(0.0, abs=1e-4)  # of the policy to its reference: the same
        rewards[n] = sum(columns["reward"])
    assert rewards[32] > rewards[2]


def test_the_stages_have_noise_of_their_own_and_the_same_every_time(best_of_n, make_trainer, new_prompts):
    module = best_of_n()
    first, metrics = evaluated(make_trainer, new_prompts, module, "test")
    assert metrics["test/kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    again, _ = evaluated(make_trainer, new_prompts, best_of_n(), "test")
    assert first == again
    predicted = make_trainer().predict(best_of_n(), datamodule=new_prompts())
    assert [columns["prompt"] for columns in predicted] == [["\4", "\3\2\1"], ["\6\6"]]
    assert [response for columns in predicted for response in columns["chosen"]] != first["response"]


@pytest.mark.parametrize("penalty", [0.0, 1000.0])
def test_predictions_are_the_best_the_worst_and_by_how_much(
    best_of_n, make_trainer, new_prompts, reward_function, penalty
):
    for seed in range(1, 20):  # until some of the last prompt's responses end and some do not
        torch.manual_seed(seed)
        module = best_of_n(missing_eos_penalty=penalty)
        batches = make_trainer().predict(module, datamodule=new_prompts())
        batch = new_prompts.batch(["\6\6"] * 4)
        rollout = module.roll_out(batch, range(8, 12), -2)
        if 0 < rollout.ended.sum() < 4:
            break
    responses = module.score(rollout, batch).responses
    rewards = reward_function(batch["prompts"], responses)
    scores = [r if ended else r - penalty for r, ended in zip(rewards, rollout.ended.tolist(), strict=True)]
    best, worst = (scores.index(extreme(scores)) for extreme in (max, min))
    assert batches[1] == {
        "prompt": ["\6\6"],
        "chosen": [responses[best]],
        "rejected": [responses[worst]],
        "reward": [rewards[best]],
        "margin": [pytest.approx(max(scores) - min(scores))],
    }
    assert (scores[best] - scores[worst] > 500) == (penalty > 0)


def test_kl_of_best_of_n_is_to_the_reference_that_is_given(best_of_n, make_trainer, new_prompts, other_policy):
    own, _ = evaluated(make_trainer, new_prompts, best_of_n())
    columns, metrics = evaluated(make_trainer, new_prompts, best_of_n(reference=other_policy))
    assert columns["response"] == own["response"]
    assert abs(metrics["val/kl"]) > 0.1


def test_penalties_choose_too(best_of_n, make_trainer, new_prompts):
    plain, _ = evaluated(make_trainer, new_prompts, best_of_n(n=16))
    columns, _ = evaluated(make_trainer, new_prompts, best_of_n(n=16, missing_eos_penalty=1000.0))
    assert sum(columns["ended"]) > sum(plain["ended"])
    short, _ = evaluated(make_trainer, new_prompts, best_of_n(n=16, overlong_buffer=6, reward=constant))
    long, _ = evaluated(make_trainer, new_prompts, best_of_n(n=16, reward=constant))
    assert sum(short["length"]) < sum(long["length"])


def constant(prompts, responses, **_):
    return [1.0] * len(prompts)


def test_nothing_can_be_trained_or_picked_without_a_reward(best_of_n, fit, make_trainer, new_prompts):
    with pytest.raises(ValueError, match="`BestOfNModule` trains nothing: use validate, test or predict"):
        fit(best_of_n())
    with pytest.raises(ValueError, match="`reward` is required"):
        make_trainer().validate(best_of_n(reward=None), datamodule=new_prompts(), verbose=False)
    with pytest.raises(ValueError, match="`reward` is required to pick the best of n"):
        make_trainer().predict(best_of_n(reward=None), datamodule=new_prompts())
    with pytest.raises(ValueError, match="`n` must be at least 2, but got 1"):
        best_of_n(n=1)
