"""Alarms end to end: real modules, sabotaged and healthy, and runs that no alarm changes."""

import importlib.util
import inspect
import json
import math
from pathlib import Path

import pytest
import torch

from lightning_rlhf.callbacks import alarms, watchdogs
from lightning_rlhf.callbacks.alarm import FILENAME, Alarm, AlarmWarning, MetricAlarm
from lightning_rlhf.callbacks.alarms import CriticAlarm, EntropyAlarm, KLAlarm, LengthAlarm, RatioAlarm, SpreadAlarm
from lightning_rlhf.callbacks.reproducer import load_reproducer
from lightning_rlhf.callbacks.watchdogs import NonFiniteAlarm, NonFiniteError, StepTimeAlarm
from lightning_rlhf.modules import GRPOModule, PPOModule
from lightning_rlhf.modules.ppo import PPOExperience

_spec = importlib.util.spec_from_file_location(
    "modules_conftest", Path(__file__).parents[1] / "modules" / "conftest.py"
)
modules_conftest = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(modules_conftest)
policy, short, ppo, fit = (getattr(modules_conftest, name) for name in ("policy", "short", "ppo", "fit"))

ALARMS = [
    kind
    for module in (alarms, watchdogs)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, Alarm) and kind not in (Alarm, MetricAlarm, StepTimeAlarm)
]
pytestmark = [pytest.mark.filterwarnings(advice) for advice in modules_conftest._ADVICE]


@pytest.fixture
def grpo(short):
    """A GRPOModule."""
    return short(GRPOModule, group_size=3, minibatch_size=3)


def raised(folder):
    """Names of the alarms that were raised."""
    path = folder / FILENAME
    return [json.loads(line)["alarm"] for line in path.read_text().splitlines()] if path.exists() else []


def healthy(**options):
    """A rate at which little happens in a few iterations."""
    return {"learning_rate": 1e-4, "rollout_batch_size": 24, "minibatch_size": 12} | options


def test_all_alarms_are_known_here():
    assert len(ALARMS) == 11


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_healthy_run_raises_none(kind, fit, tmp_path, request):
    module = request.getfixturevalue(kind)(**healthy(kl_coef=0.05))
    stopping = [alarm(action="stop") for alarm in ALARMS if alarm is not CriticAlarm]
    fit(module, callbacks=[*stopping, CriticAlarm(patience=20)], max_epochs=6, limit_val_batches=1.0)
    assert module.current_epoch == 6
    assert raised(tmp_path) == []


def test_kl_blows_up_without_a_price_on_it(ppo, fit, tmp_path):
    alarm = KLAlarm(threshold=5.0, action="stop")
    sabotaged = ppo(**healthy(kl_coef=0.0, learning_rate=3e-2, num_passes=4))
    with pytest.warns(AlarmWarning, match="above 5"):
        fit(sabotaged, callbacks=[alarm], max_epochs=10)
    assert sabotaged.current_epoch < 10
    assert raised(tmp_path) == ["KLAlarm"]


def test_entropy_collapses_on_a_reward_for_one_token(grpo, fit, tmp_path):
    def fives(prompts, responses, **columns):
        return [float(response.count("\5")) for response in responses]

    sabotaged = grpo(reward=fives, **healthy(kl_coef=0.0, learning_rate=1e-2, num_passes=2))
    with pytest.warns(AlarmWarning, match="rollout/entropy"):
        fit(sabotaged, callbacks=[EntropyAlarm(action="stop")], max_epochs=20)
    assert sabotaged.current_epoch < 20
    assert raised(tmp_path) == ["EntropyAlarm"]


def test_responses_grow_on_a_reward_for_length(ppo, fit, tmp_path):
    def longer(prompts, responses, **columns):
        return [float(len(response)) for response in responses]

    sabotaged = ppo(reward=longer, max_new_tokens=40, **healthy(kl_coef=0.0, learning_rate=1e-2, num_passes=2))
    with pytest.warns(AlarmWarning, match="rollout/response_length"):
        fit(sabotaged, callbacks=[LengthAlarm(action="stop")], max_epochs=20)
    assert raised(tmp_path) == ["LengthAlarm"]


def test_dead_critic(ppo, fit, tmp_path):
    """The value head starts at 0, and with a learning rate of 0 stays there."""
    with pytest.warns(AlarmWarning, match="value/explained_variance"):
        fit(ppo(**healthy(value_learning_rate=0.0)), callbacks=[CriticAlarm(patience=3, action="stop")], max_epochs=5)
    assert raised(tmp_path) == ["CriticAlarm"]


def test_a_critic_that_learns_is_not_dead(ppo, fit, tmp_path):
    def easy(prompts, responses, **columns):
        return [10.0 * len(prompt) for prompt in prompts]

    living = ppo(reward=easy, **healthy(value_learning_rate=0.1, num_passes=8, kl_coef=0.0, clip_range_value=None))
    fit(living, callbacks=[CriticAlarm(patience=3, action="stop")], max_epochs=6)
    assert living.current_epoch == 6
    assert raised(tmp_path) == []


def test_a_constant_reward_leaves_no_spread(grpo, fit, tmp_path):
    def constant(prompts, responses, **columns):
        return [1.0] * len(responses)

    with pytest.warns(AlarmWarning, match="rollout/groups_with_spread"):
        fit(grpo(reward=constant), callbacks=[SpreadAlarm(action="stop")], max_epochs=5)
    assert raised(tmp_path) == ["SpreadAlarm"]


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_other_log_probabilities_in_the_update(kind, fit, tmp_path, monkeypatch, request):
    """As with dropout in training steps, or a temperature that one of the two forgets."""
    module = request.getfixturevalue(kind)()
    right, step = type(module).read, type(module).training_step

    def misread(self, *args, **kwargs):
        said = right(self, *args, **kwargs)
        return said._replace(logprobs=1.01 * said.logprobs)

    def wrong(self, batch, batch_idx):
        with monkeypatch.context() as within:
            within.setattr(type(self), "read", misread)
            return step(self, batch, batch_idx)

    monkeypatch.setattr(type(module), "training_step", wrong)
    with pytest.warns(AlarmWarning, match="policy/first_ratio_error"):
        fit(module, callbacks=[RatioAlarm(action="stop")], max_epochs=3)
    assert raised(tmp_path) == ["RatioAlarm"]


def after_rollout(module, change):
    """Lets `change` meddle with each iteration's experience, which the rollout has just made."""
    fill = module.fill
    module.fill = lambda experience: (change(experience), fill(experience))
    return module


class TestNonFinite:
    def nan_once(self, experience):
        experience.advantages[0] = math.nan

    def test_a_nan_in_one_micro_batch_does_not_reach_the_weights(self, ppo, fit, tmp_path):
        module = after_rollout(ppo(minibatch_size=1), self.nan_once)
        module.configure_model()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        with pytest.raises(NonFiniteError, match="the loss is nan"):
            fit(module, callbacks=[NonFiniteAlarm(action="stop")], accumulate_grad_batches=6)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)

    def test_replaying_its_reproducer_gives_the_nan_again(self, ppo, fit, tmp_path):
        module = after_rollout(ppo(minibatch_size=1), self.nan_once)
        with pytest.raises(NonFiniteError):
            fit(module, callbacks=[NonFiniteAlarm(action="stop")], accumulate_grad_batches=6)
        found = load_reproducer(tmp_path / "nonfinite")
        assert found.module_class == "lightning_rlhf.modules.ppo.PPOModule"
        again = PPOModule(**found.hparams)  # it had a function for a reward, which is not kept and not needed
        again.configure_model()
        again.load_state_dict(found.weights, strict=False)
        again.log_update = lambda *args, **kwargs: None  # needs a trainer
        losses = [again.training_step(PPOExperience(**batch), 0).item() for batch in found.batches]
        assert len(losses) == 6
        assert sum(map(math.isnan, losses)) == 1
        # Lightning divides each micro-batch's loss by their number
        assert losses == pytest.approx([6 * loss for loss in found.losses], nan_ok=True)

    def test_a_poisoned_weight(self, grpo, fit, tmp_path):
        module = grpo()

        def poison(experience):
            with torch.no_grad():
                next(module.policy.parameters())[3] = math.inf

        after_rollout(module, poison)  # with it the rollout could not sample
        with pytest.raises(NonFiniteError):
            fit(module, callbacks=[NonFiniteAlarm(action="stop")])
        name, weight = next(iter(load_reproducer(tmp_path / "nonfinite").weights.items()))
        assert name.startswith("policy.")
        assert weight[3].isinf().all()


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_run_with_all_alarms_is_bit_identical_to_one_without(kind, fit, tmp_path, request):
    make = request.getfixturevalue(kind)
    options = dict(max_epochs=3, limit_val_batches=1.0, accumulate_grad_batches=2, gradient_clip_val=1.0)
    settings = dict(minibatch_size=3, rollout_batch_size=12, kl_coef=0.0, learning_rate=3e-2)
    states = []
    for given in ([], [alarm(action="warn") for alarm in ALARMS]):
        torch.manual_seed(1)
        module = fit(make(**settings), callbacks=given, **options)
        states.append((module.state_dict(), module.samples, torch.get_rng_state()))
    (bare, samples, drawn), (watched, watched_samples, watched_drawn) = states
    assert samples == watched_samples
    assert torch.equal(drawn, watched_drawn)
    assert bare.keys() == watched.keys()
    for name, value in bare.items():
        assert torch.equal(value, watched[name]), name
