"""Online DPO: which responses make a pair, what their label is, and what is learned from them."""

import itertools

import pytest
import slow
import torch
from slow import experience_of, letters_of, logged, moved_policy, sequences, silent, slow_logprobs
from transformers import AutoModelForCausalLM

from lightning_rlhf.modules import OnlineDPOModule
from lightning_rlhf.modules.objectives import CPO, DPO, IPO, ORPO, Hinge, SimPO


@pytest.fixture
def online(short):
    """An OnlineDPOModule that learns from three pairs, of the best and worst of four responses to each prompt."""
    return short(OnlineDPOModule, group_size=4, rollout_batch_size=12)


# --- pairs and labels ---------------------------------------------------------------------------------------------


def test_a_pair_is_the_best_and_the_worst(online):
    module = online()
    assert module.pairs(torch.tensor([1.0, 3.0, 0.0, 2.0, 9.0, 7.0, 8.0, 7.5])) == [1, 2, 4, 5]
    two = online(group_size=2)
    assert two.pairs(torch.tensor([1.0, 3.0, 5.0, 4.0])) == [1, 0, 2, 3]


def test_of_equal_scores_the_first_and_the_last_make_a_pair(online):
    module = online()
    assert module.pairs(torch.tensor([1.0, 1.0, 1.0, 1.0])) == [0, 3]
    assert module.pairs(torch.tensor([2.0, 5.0, 5.0, 2.0])) == [1, 3]
    assert module.pairs(torch.tensor([2.0, 2.0, 5.0, 5.0])) == [2, 1]


def test_labels_by_hand(online):
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 1.5, 1.25])
    assert online().preference(scores).tolist() == [1, 1, 0.5, 0.5, 1, 1]  # certain, however small the difference
    found = online(label_temperature=0.5).preference(scores)
    # σ(4) = 0.98201, σ(0) = 0.5, σ(0.5) = 0.62246
    torch.testing.assert_close(found, torch.tensor([0.98201, 0.98201, 0.5, 0.5, 0.62246, 0.62246]), atol=1e-5, rtol=0)
    torch.testing.assert_close(online(label_temperature=1e-6).preference(scores), online().preference(scores))


@pytest.mark.parametrize("options", [{}, {"label_temperature": 0.7}, {"group_size": 2}, {"group_size": 6}], ids=str)
def test_experience_is_the_pairs_of_the_samples(online, fit, policy, options):
    module = fit(moved_policy(online(learning_rate=0.0, **options)))
    e, rewards, size = experience_of(module), module.samples["reward"], module.hparams.group_size
    reference = AutoModelForCausalLM.from_pretrained(policy)
    rows, learned, gaps = sequences(e), letters_of(e), []
    assert len(rows) == 24 // size
    for pair in range(12 // size):
        group = rewards[pair * size : (pair + 1) * size]
        better, worse = learned[2 * pair : 2 * pair + 2]
        assert (better, worse) == (max(group), min(group))
        gaps.append(better - worse)
        label = 1 / (1 + 2.718281828459045 ** -(gaps[-1] / 0.7)) if "label_temperature" in options else 1.0
        label = 0.5 if gaps[-1] == 0 else label
        assert e.preference[2 * pair : 2 * pair + 2].tolist() == pytest.approx([label, label], rel=1e-5)
        for i in (2 * pair, 2 * pair + 1):
            prompt, response = rows[i]
            assert "".join(map(chr, prompt)) == module.samples["prompt"][pair * size]
            text = "".join(map(chr, response)).rstrip("\0")
            assert text in module.samples["response"][pair * size : (pair + 1) * size]
            expected = torch.tensor(slow_logprobs(reference, module, prompt, response), dtype=torch.float32)
            torch.testing.assert_close(e.ref_logprobs[i, : len(response)], expected, rtol=1e-4, atol=1e-5)
    metrics = logged(module)
    assert max(gaps) > 0
    assert metrics["rollout/pair_gap"] == pytest.approx(sum(gaps) / len(gaps))
    assert metrics["rollout/groups_with_spread"] == pytest.approx(sum(gap != 0 for gap in gaps) / len(gaps))
    assert metrics["rollout/tied_pairs"] == pytest.approx(sum(gap == 0 for gap in gaps) / len(gaps))
    assert metrics["rollout/reward"] == pytest.approx(sum(rewards) / 12)  # of all samples


def test_shaped_scores_order(online, fit):
    """Turned round by a penalty above all rewards: what did not end comes last."""
    for seed in range(1, 20):
        torch.manual_seed(seed)
        module = fit(online(learning_rate=0.0, missing_eos_penalty=1000.0))
        ended = [module.samples["ended"][start : start + 4] for start in (0, 4, 8)]
        if all(any(group) and not all(group) for group in ended):
            break
    assert [response[-1] == 0 for _, response in sequences(experience_of(module))] == [True, False] * 3


@pytest.mark.parametrize("minibatch", [2, 6])
def test_minibatches_hold_whole_pairs(online, fit, minibatch):
    seen = []
    module = online(minibatch_size=minibatch, num_passes=2)
    step = module.training_step
    module.training_step = lambda batch, batch_idx: (seen.append(batch), step(batch, batch_idx))[1]
    fit(module)
    whole = experience_of(module)
    pairs = {(tuple(map(tuple, p)), tuple(map(tuple, r))) for (p, r) in _pairs_of(whole)}
    found = [(tuple(map(tuple, p)), tuple(map(tuple, r))) for batch in seen for p, r in _pairs_of(batch)]
    assert len(found) == 6
    assert set(found) == pairs
    assert [len(batch.prompt_ids) for batch in seen] == [minibatch] * (12 // minibatch)


def _pairs_of(e):
    rows = sequences(e)
    return list(zip(rows[0::2], rows[1::2], strict=True))


# --- the loss -----------------------------------------------------------------------------------------------------


def slow_dpo(u, v, beta):
    """−log σ(β (u_w − u_l)) in float64."""
    return torch.log1p((-beta * (u - v)).exp())


def slow_loss(module, e, beta, of_objective=slow_dpo):
    """Mean over the pairs of p l(w, l) + (1 − p) l(l, w); differentiable. Also the margins."""
    losses, margins, ratios = [], [], []
    for i, (prompt, response) in enumerate(sequences(e)):
        logs, _ = slow.softmaxes(module.policy, module, prompt, response)
        ratios.append(sum(logs[t, token] - e.ref_logprobs[i, t].double() for t, token in enumerate(response)))
    for i in range(0, len(ratios), 2):
        better, worse, p = ratios[i], ratios[i + 1], e.preference[i].double()
        losses.append(p * of_objective(better, worse, beta) + (1 - p) * of_objective(worse, better, beta))
        margins.append(beta * (better - worse).item())
    return sum(losses) / len(losses), margins


@pytest.fixture
def fixed(online, fit):
    """A module, and pairs with a reference and labels of their own."""

    def make(**options):
        module = fit(moved_policy(online(learning_rate=0.0, **options)))
        e, noise = experience_of(module), torch.Generator().manual_seed(11)
        shift = torch.randn(e.ref_logprobs.shape, generator=noise)
        ref_logprobs = (e.ref_logprobs + 0.5 * shift).where(e.response_mask, 0.0)
        preference = torch.tensor([1.0, 0.5, 0.7]).repeat_interleave(2)
        return silent(module), e._replace(ref_logprobs=ref_logprobs, preference=preference)

    return make


@pytest.mark.parametrize("beta", [0.1, 0.8])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "min_new_tokens": 2}], ids=str)
def test_loss_and_gradient_equal_the_restatement(fixed, options, beta):
    module, e = fixed(objective=DPO(beta), **options)
    means = {}
    module.log_mean = lambda name, values, **_: means.update({name: values.mean().item()})
    module.log = lambda name, value, **_: means.update({name: value})
    _, gradients = slow.gradient_of(module, e)
    double = silent(slow.copy_of(module, **options)).double()
    loss, margins = slow_loss(double, e, beta)
    loss.backward()
    assert means["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert means["train/margin"] == pytest.approx(sum(margins) / 3, rel=1e-4)
    assert means["train/accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    for name, p in double.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad.float(), rtol=1e-4, atol=1e-5)
    assert gradients["policy.lm_head.weight"].abs().max() > 1e-3


def test_what_is_seen_of_pairs_is_as_in_loops(fixed):
    module, e = fixed(objective=DPO(0.3))
    seen = {}
    module.log_mean = lambda name, values, **_: seen.update({name: values.tolist()})
    module.training_step(slow.with_garbage(e), 0)
    double = silent(slow.copy_of(module)).double()
    logprobs, rewards = [], []
    for i, (prompt, response) in enumerate(sequences(e)):
        logs, _ = slow.softmaxes(double.policy, double, prompt, response)
        logprobs.append(sum(logs[t, token].item() for t, token in enumerate(response)))
        rewards.append(0.3 * (logprobs[-1] - sum(e.ref_logprobs[i, : len(response)].tolist())))
    expected = {
        "reward_chosen": rewards[0::2],
        "reward_rejected": rewards[1::2],
        "margin": [a - b for a, b in zip(rewards[0::2], rewards[1::2], strict=True)],
        "logprob_chosen": logprobs[0::2],
        "logprob_rejected": logprobs[1::2],
    }
    for name, values in expected.items():
        assert seen[f"train/{name}"] == pytest.approx(values, rel=1e-4, abs=1e-5), name


def test_ipo_equals_its_restatement(fixed):
    module, e = fixed(objective=IPO(0.4))
    _, gradients = slow.gradient_of(module, e)
    double = silent(slow.copy_of(module)).double()
    loss, _ = slow_loss(double, e, 0.4, lambda u, v, beta: (u - v - 1 / (2 * beta)) ** 2)
    loss.backward()
    for name, p in double.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad.float(), rtol=1e-4, atol=1e-4)


def test_objectives_learn_different_things(fixed):
    module, e = fixed()
    found = []
    for objective in (DPO(), DPO(0.5), IPO(), Hinge(), SimPO(), CPO(), ORPO()):
        module.objective = objective
        found.append(slow.gradient_of(module, e)[1]["policy.lm_head.weight"])
    for one, other in itertools.combinations(found, 2):
        assert not torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_a_pair_of_equals_pulls_to_the_reference(fixed):
    """At label ½ and no difference between policy and reference, DPO's gradient is 0."""
    module, e = fixed()
    with torch.no_grad():
        logprobs = module.read(module.policy, e).logprobs
    at_rest = e._replace(ref_logprobs=logprobs.where(e.response_mask, 0.0), preference=torch.full((6,), 0.5))
    _, gradients = slow.gradient_of(module, at_rest)
    assert max(g.abs().max() for g in gradients.values()) < 1e-6
    _, gradients = slow.gradient_of(module, at_rest._replace(preference=torch.ones(6)))
    assert max(g.abs().max() for g in gradients.values()) > 1e-2


def test_what_lies_under_the_masks_changes_neither_loss_nor_gradient(fixed):
    module, e = fixed()
    loss, gradients = slow.gradient_of(module, e)
    again, after = slow.gradient_of(module, slow.with_garbage(e))
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-4, atol=1e-5)


def test_micro_batches_change_no_gradient(online, fit, new_gradients):
    found = []
    for minibatch, accumulate in [(6, 1), (2, 3)]:
        watch = new_gradients()
        module = moved_policy(online(learning_rate=0.0, minibatch_size=minibatch, label_temperature=1.0))
        fit(module, callbacks=[watch], accumulate_grad_batches=accumulate)
        assert len(watch.steps) == 1
        found.append((watch.steps[0], logged(module)))
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4, abs=1e-6)
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], gradient, rtol=1e-4, atol=1e-5)


# --- the reference, checkpoints -----------------------------------------------------------------------------------


def test_the_first_margin_is_0_and_grows(online, fit):
    module = fit(online(learning_rate=0.0))
    assert logged(module)["train/margin"] == pytest.approx(0.0, abs=1e-6)
    assert logged(module)["train/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert logged(fit(online(num_passes=3)))["train/margin"] > 1e-3


@pytest.mark.parametrize("given", [False, True])
def test_the_reference_does_not_move_and_is_in_no_checkpoint(online, fit, policy, other_policy, given, tmp_path):
    module = fit(online(learning_rate=0.1, reference=other_policy if given else None), max_epochs=2)
    expected = AutoModelForCausalLM.from_pretrained(other_policy if given else policy)
    with module.reference() as reference:
        slow.assert_same_bits(slow.bits(reference), expected.state_dict())
    e = experience_of(module)
    prompt, response = sequences(e)[0]
    logprobs = torch.tensor(slow_logprobs(expected, module, prompt, response), dtype=torch.float32)
    torch.testing.assert_close(e.ref_logprobs[0, : len(response)], logprobs, rtol=1e-4, atol=1e-5)
    names = slow.saved(module, tmp_path / "a.ckpt")["state_dict"].keys()
    assert names == {f"policy.{name}" for name, _ in module.policy.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"lora_r": 4, "label_temperature": 1.0, "normalize_scores": True}], ids=str)
@pytest.mark.parametrize("step", [3, 5], ids=["between iterations", "within one"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(online, fit, tmp_path, options, step):
    whole = fit(online(**options), max_epochs=3, callbacks=[slow.SaveAt(step, tmp_path / "a.ckpt")])
    resumed = fit(online(**options), max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    slow.assert_same_bits(slow.bits(resumed.policy), slow.bits(whole.policy))
    assert resumed.samples == whole.samples
    assert resumed.score_moments == whole.score_moments
    assert logged(resumed) == logged(whole)


def test_a_reward_that_counts_a_letter_is_learned(online, fit):
    def ones(prompts, responses, **_):
        return [r.count("\1") / 6 for r in responses]

    options = dict(reward=ones, rollout_batch_size=64, minibatch_size=32, num_passes=2)
    start = fit(online(**options, learning_rate=0.0))
    module = fit(online(**options, learning_rate=1e-2), max_epochs=10)
    assert sum(start.samples["reward"]) / 64 < 0.3
    assert sum(module.samples["reward"]) / 64 > 0.5


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "`group_size` must be at least 2, to make pairs, but got 1"),
        ({"group_size": 5}, r"`group_size` must divide `rollout_batch_size`: 12 / 5 = 2\.4"),
        ({"label_temperature": -1.0}, r"`label_temperature` must be at least 0, but got -1\.0"),
        ({"minibatch_size": 4}, r"`minibatch_size` must divide `2 \* rollout_batch_size / group_size`: 6 / 4 = 1\.5"),
        ({"minibatch_size": 3}, "`minibatch_size` must be a multiple of 2, but got 3"),
        ({"minibatch_size": 1}, "`minibatch_size` must be a multiple of 2, but got 1"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_named(online, options, message):
    with pytest.raises(ValueError, match=message):
        online(**options)


def test_accumulation_must_divide_a_pass(online, fit):
    with pytest.raises(
        ValueError, match=r"2 \* rollout_batch_size / group_size / minibatch_size = 6 / 2 = 3, and 3 / 2"
    ):
        fit(online(), accumulate_grad_batches=2)
