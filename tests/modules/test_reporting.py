"""What on-policy modules log and keep to be looked at, restated from the samples themselves."""

import itertools
import math
import statistics

import pytest
import torch

from lightning_rlhf.modules import BestOfNModule, GRPOModule, OnlineDPOModule, PPOModule, RFTModule
from lightning_rlhf.modules.reporting import Seen, figures_of_all


def logged(module):
    return {name: float(value) for name, value in module.trainer.callback_metrics.items()}


def pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return top / (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5


def test_figures_of_a_set_by_hand():
    parts = [Seen([1.0, 3.0], [[5, 6], [5, 6, 7]], [1.0, 1.0]), Seen([2.0], [[6]], [5.0])]
    found = figures_of_all(parts)
    assert found["reward_std"] == pytest.approx(1.0)
    assert found["reward_length_correlation"] == pytest.approx(pearson([1, 3, 2], [2, 3, 1]))
    assert found["distinct_1"] == pytest.approx(3 / 6)
    assert found["distinct_2"] == pytest.approx(2 / 3)
    assert found["reference_reward"] == pytest.approx(7 / 3)
    assert found["win_rate"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["win_rate_low"] < found["win_rate"] < found["win_rate_high"]


def test_what_is_not_defined_is_not_a_number():
    found = figures_of_all([Seen([1.0, 3.0], [[5], [6]], [])])
    assert found.keys() == {"reward_std", "reward_length_correlation", "distinct_1", "distinct_2"}
    assert math.isnan(found["reward_length_correlation"])
    assert found["reward_std"] == pytest.approx(2**0.5)
    assert math.isnan(figures_of_all([Seen([1.0], [[5]], [])])["reward_std"])


def test_batches_and_their_order_change_no_figure():
    rewards, ids, others = [0.5, 2.0, -1.0, 4.0], [[1], [2, 3], [1, 2, 3], [4]], [1.0, 1.0, -1.0, 0.0]
    whole = figures_of_all([Seen(rewards, ids, others)])
    turned = [Seen(rewards[i : i + 1], ids[i : i + 1], others[i : i + 1]) for i in (2, 0, 3, 1)]
    assert figures_of_all(turned) == pytest.approx(whole)


@pytest.mark.parametrize("kind", [PPOModule, GRPOModule, RFTModule, OnlineDPOModule])
def test_an_iterations_figures_are_those_of_its_samples(short, fit, kind):
    module = fit(short(kind)(rollout_batch_size=12, **({} if kind is PPOModule else {"group_size": 2})))
    found, samples, tokens = logged(module), module.samples, module.per_token
    lengths = samples["length"]
    assert found["rollout/reward_std"] == pytest.approx(statistics.stdev(samples["reward"]))
    assert found["rollout/reward_length_correlation"] == pytest.approx(pearson(samples["reward"], lengths))
    assert found["rollout/truncated_rate"] == pytest.approx(1 - sum(samples["ended"]) / 12)
    assert found["rollout/kl_per_token"] == pytest.approx(sum(samples["kl"]) / sum(lengths), abs=1e-6)
    ids = [row[mask].tolist() for row, mask in zip(tokens["token_ids"], tokens["mask"], strict=True)]
    assert [len(row) for row in ids] == lengths
    assert found["rollout/distinct_1"] == pytest.approx(len({i for row in ids for i in row}) / sum(lengths))
    pairs = [pair for row in ids for pair in itertools.pairwise(row)]
    assert found["rollout/distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs))
    assert found["progress/episodes"] == 12
    assert found["progress/tokens"] == sum(lengths)
    assert found["progress/iteration"] == 1
    assert found["progress/optimizer_steps"] == module.trainer.global_step
    phases = [found[f"time/{phase}"] for phase in ("rollout", "scoring", "update")]
    assert all(seconds > 0 for seconds in phases)
    assert found["time/iteration"] == pytest.approx(sum(phases), rel=1e-4)


def test_what_is_known_of_tokens_is_kept(ppo, fit, moved):
    module = fit(moved(ppo(learning_rate=0.0)))
    tokens, mask = module.per_token, module.per_token["mask"]
    assert {"token_ids", "mask", "logprob", "kl", "entropy", "value", "advantage"} == tokens.keys()
    assert all(column.shape == mask.shape and column.device.type == "cpu" for column in tokens.values())
    experience = module._experience.experience
    for name, of_experience in {"token_ids": "response_ids", "logprob": "logprobs", "value": "values"}.items():
        assert torch.equal(tokens[name], getattr(experience, of_experience)), name
    assert torch.equal(tokens["advantage"], experience.advantages)
    kl = (tokens["kl"] * mask).sum(1)
    torch.testing.assert_close(kl, torch.tensor(module.samples["kl"]))


def test_counters_go_on_through_iterations_and_resumes(ppo, fit, tmp_path):
    module = fit(ppo(), max_epochs=2)
    module.trainer.save_checkpoint(tmp_path / "half.ckpt")
    half = dict(module.progress)
    assert half["episodes"] == 12
    whole = fit(ppo(), max_epochs=3)
    resumed = fit(ppo(), max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.progress == whole.progress
    assert resumed.progress["tokens"] == half["tokens"] + sum(resumed.samples["length"])


def test_dynamic_sampling_counts_all_that_it_sampled(short, fit):
    constant = {"reward": lambda prompts, responses, **_: [0.0] * 6}
    module = fit(short(GRPOModule)(group_size=2, max_sampling_rounds=4, **constant))
    assert module.progress["episodes"] == 4 * 6


def test_ratios_range_from_their_smallest_to_their_largest(ppo, fit):
    class Noted(PPOModule):
        ratios = ()

        def log_update(self, batch, batch_idx, logprobs, *args, **kwargs):
            ratio = (logprobs - batch.logprobs).detach().exp()[batch.response_mask]
            self.ratios = [*self.ratios, ratio]
            super().log_update(batch, batch_idx, logprobs, *args, **kwargs)

    settings = dict(ppo().hparams) | {"reward": lambda prompts, responses, **_: [float(len(r)) for r in responses]}
    module = fit(Noted(**settings | {"num_passes": 2, "clip_range_value": 0.01}))
    every, found = torch.cat(module.ratios), logged(module)
    assert found["policy/ratio_min"] == pytest.approx(every.min().item())
    assert found["policy/ratio_max"] == pytest.approx(every.max().item())
    assert every.min() < 0.99
    assert every.max() > 1.01
    assert found["policy/first_ratio_error"] < 1e-5  # of the first minibatch alone: the others' ratios are far from 1
    assert 0 < found["value/clip_fraction"] <= 1


def test_values_that_are_not_clipped_have_no_clip_fraction(ppo, fit):
    assert "value/clip_fraction" not in logged(fit(ppo(clip_range_value=None)))


def test_gradient_norms_are_those_of_the_groups_before_clipping(ppo, fit, gradients):
    module = fit(ppo(), callbacks=[gradients], max_steps=1)
    step, found = gradients.steps[0], logged(module)
    for group in ("policy", "value"):
        squares = sum(g.double().square().sum().item() for name, g in step.items() if name.startswith(group))
        assert found[f"{group}/grad_norm"] == pytest.approx(squares**0.5, rel=1e-5)
    clipped = logged(fit(ppo(), max_steps=1, gradient_clip_val=1e-6))
    assert clipped["policy/grad_norm"] == pytest.approx(found["policy/grad_norm"])


def test_validation_compares_with_the_reference(ppo, fit, reward_function):
    module = fit(ppo(learning_rate=0.0), limit_val_batches=1.0, num_sanity_val_steps=0)
    found = logged(module)
    assert found["val/win_rate"] == found["val/win_rate_low"] == found["val/win_rate_high"] == 0.5  # the same texts
    assert found["val/reference_reward"] == pytest.approx(found["val/reward"])
    assert {"val/reward_std", "val/distinct_2", "val/truncated_rate"} <= found.keys()


class Evaluations(list):
    """The columns of every validation, and how often the reference sampled."""

    def watch(self, module):
        step = module.validation_step

        def seen(batch, batch_idx):
            self.append(step(batch, batch_idx))
            return self[-1]

        module.validation_step = seen
        return module


def test_the_references_answers_are_sampled_once_and_stay(ppo, fit, moved, monkeypatch):
    asked = []
    sampled = PPOModule.roll_out

    def counted(self, *args, sampler=None):
        asked.append(sampler is not None)
        return sampled(self, *args, sampler=sampler)

    monkeypatch.setattr(PPOModule, "roll_out", counted)
    evaluations = Evaluations()
    module = evaluations.watch(ppo(learning_rate=0.05))
    fit(module, max_epochs=2, limit_val_batches=1.0, num_sanity_val_steps=-1)
    assert sum(asked) == 2  # two batches
    before, after = evaluations[:2], evaluations[-2:]
    assert [part["response"] for part in before] == [part["reference_response"] for part in after]
    assert [part["reward"] for part in before] == [part["reference_reward"] for part in after]
    assert [part["response"] for part in after] != [part["reference_response"] for part in after]
    rewards = [reward for part in after for reward in part["reward"]]
    others = [reward for part in after for reward in part["reference_reward"]]
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(rewards, others, strict=True)]
    assert logged(module)["val/win_rate"] == pytest.approx(sum(won) / len(won))


def test_with_normalised_rewards_both_are_scored_alike(ppo, fit, reward_function):
    evaluations = Evaluations()
    module = evaluations.watch(ppo(learning_rate=0.0, normalize_rewards=True))
    fit(module, max_epochs=3, limit_val_batches=1.0, num_sanity_val_steps=-1)
    assert evaluations[-1]["reward"] == evaluations[-1]["reference_reward"]
    assert evaluations[-1]["reward"] != evaluations[1]["reward"]  # the scale has moved on


def test_best_of_n_has_the_figures_too(policy, make_trainer, new_prompts, reward_function):
    module = BestOfNModule(policy, reward_function, n=3, max_new_tokens=4)
    make_trainer().validate(module, datamodule=new_prompts(), verbose=False)
    assert {"val/reward_std", "val/distinct_1"} <= logged(module).keys()
