"""Rewards: functions, models, weighted lists, and what is said when they fail."""

import sys
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lightning_rlhf.modules import RewardModule
from lightning_rlhf.modules.scoring import ModelReward, WeightedRewards, reward_terms


def lengths(prompts, responses, **columns):
    return [len(r) for r in responses]


def shouting(prompts, responses, **columns):
    return [float(r.isupper()) for r in responses]


@pytest.fixture
def my_rewards(monkeypatch):
    module = ModuleType("my_rewards")
    module.lengths, module.number = lengths, 3
    monkeypatch.setitem(sys.modules, "my_rewards", module)


def score(spec, prompts, responses, columns=None, weights=None, batch_size=32):
    terms = reward_terms(spec, "float32", batch_size)
    return WeightedRewards(terms, weights)(prompts, responses, columns or {})


@pytest.mark.parametrize("spec", [lengths, "my_rewards.lengths", [lengths]], ids=["function", "dotted path", "list"])
def test_functions_come_as_objects_or_dotted_paths(my_rewards, spec):
    scores = score(spec, ["a", "b"], ["xyz", ""])
    torch.testing.assert_close(scores.total, torch.tensor([3.0, 0.0]))
    assert list(scores.components) == ["lengths"]


def test_prompts_responses_and_columns_reach_the_function():
    seen = {}

    def look(**given):
        seen.update(given)
        return [0, 0]

    score(look, ["p", "q"], ["r", "s"], {"answer": [1, 2], "topic": ["x", "y"]})
    assert seen == {"prompts": ["p", "q"], "responses": ["r", "s"], "answer": [1, 2], "topic": ["x", "y"]}


def test_a_callable_object_is_named_by_its_class():
    class Judge:
        def __call__(self, prompts, responses, **_):
            return [1.0]

    assert list(score(Judge(), ["p"], ["r"]).components) == ["Judge"]


def raising(prompts, responses, **_):
    raise KeyError("gold")


def wanting(prompts, responses, gold):
    return [0.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raising, r"`raising` failed on 2 samples, the first of which was prompt 'p', response 'r': KeyError: 'gold'"),
        (wanting, r"`wanting` failed on 2 samples.*TypeError.*gold"),
        (lambda prompts, responses: [1.0], r"must return one float per response: got 1 for 2 responses"),
        (lambda prompts, responses: [1.0] * 3, r"got 3 for 2 responses"),
        (lambda prompts, responses: [0.0, float("nan")], r"returned nan for sample 1: prompt 'q', response 's'"),
        (lambda prompts, responses: [float("-inf"), 0.0], r"returned -inf for sample 0: prompt 'p', response 'r'"),
        (lambda prompts, responses: ["good", 1], r"failed on 2 samples.*ValueError"),
        (lambda prompts, responses: None, r"failed on 2 samples.*TypeError"),
    ],
)
def test_a_function_that_fails_is_named_with_its_sample(function, message):
    with pytest.raises(ValueError, match=message) as caught:
        score(function, ["p", "q"], ["r", "s"])
    assert f"`{function.__name__}`" in str(caught.value)


def test_long_samples_are_shortened_in_messages():
    with pytest.raises(ValueError, match="failed") as caught:
        score(raising, ["p" * 999], ["r" * 999])
    assert len(str(caught.value)) < 400


def test_the_total_is_the_weighted_sum_and_components_are_unweighted():
    prompts, responses = ["p"] * 3, ["AB", "abc", ""]
    scores = score([lengths, shouting], prompts, responses, weights=[0.5, -2.0])
    torch.testing.assert_close(scores.total, torch.tensor([1.0 - 2, 1.5, 0.0]))
    torch.testing.assert_close(scores.components["lengths"], torch.tensor([2.0, 3.0, 0.0]))
    torch.testing.assert_close(scores.components["shouting"], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(score([lengths, shouting], prompts, responses).total, torch.tensor([3.0, 3.0, 0.0]))


def test_weight_0_is_logged_and_not_trained_on(ppo, fit):
    module = fit(ppo(reward=[lengths, shouting, lengths], reward_weights=[1.0, 0.0, -1.0], learning_rate=0.0))
    assert module.samples["reward/lengths"] == [float(len(r)) for r in module.samples["response"]]
    assert module.samples["reward"] == [0.0] * 6
    metrics = module.trainer.callback_metrics
    assert {"rollout/reward/lengths", "rollout/reward/shouting", "rollout/reward/lengths_2"} <= metrics.keys()


def test_equal_names_are_numbered():
    scores = score([lengths, shouting, lengths, lengths], ["p"], ["abc"])
    assert list(scores.components) == ["lengths", "shouting", "lengths_2", "lengths_3"]
    assert scores.total.item() == 9


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], []])
def test_there_must_be_one_weight_per_reward(weights):
    with pytest.raises(
        ValueError, match=f"`reward_weights` must have one weight per reward: 2, but got {len(weights)}"
    ):
        score([lengths, shouting], ["p"], ["r"], weights=weights)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module.f", "`reward=no_such_module.f` is neither the dotted path of a Python function"),
        ("my_rewards.nothing", "`reward=my_rewards.nothing` is neither"),
        ("lengths", "`reward=lengths` is neither"),
        ("runs/no/such.ckpt", "`reward`: there is no checkpoint `runs/no/such.ckpt`"),
    ],
)
def test_a_reward_that_cannot_be_found_is_refused_at_once(ppo, my_rewards, spec, message):
    with pytest.raises(ValueError, match=message):
        ppo(reward=spec)


# --- reward models ------------------------------------------------------------------------------------------------

PAIRS = [("\1\2", "\3"), ("\5", "\6\7\7\1\2"), ("\2\2\2", ""), ("\7", "\1"), ("\4\4", "\5\6"), ("\3", "\3\3\3")]


def slow_scores(folder, encode):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        raw = [
            model.model(torch.tensor([encode(p + r)])).last_hidden_state[0, -1] @ model.score.weight[0]
            for p, r in PAIRS
        ]
    return (torch.stack(raw) - 0.75) / 2.5


def ids_and_eos(text):
    return [*map(ord, text), 0]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
def test_model_scores_are_those_of_single_texts_whatever_the_batch(reward_folder, batch_size):
    got = score(reward_folder, *map(list, zip(*PAIRS, strict=True)), batch_size=batch_size)
    torch.testing.assert_close(got.total, slow_scores(reward_folder, ids_and_eos))
    assert list(got.components) == ["reward_model"]
    assert got.total.unique().numel() == len(PAIRS)  # or order would not show


def test_a_model_reads_text_with_its_own_tokenizer(ppo, fit, reward_folder, tmp_path):
    """In the other tokenizer, the letter with code c has id 8 − c."""
    vocabulary = {"<eos>": 0} | {chr(8 - i): i for i in range(1, 8)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    AutoModelForSequenceClassification.from_pretrained(reward_folder).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path)
    expected = slow_scores(reward_folder, lambda text: [*(8 - ord(c) for c in text), 0])
    got = score(str(tmp_path), *map(list, zip(*PAIRS, strict=True)))
    torch.testing.assert_close(got.total, expected)
    assert not torch.allclose(expected, slow_scores(reward_folder, ids_and_eos))
    fit(ppo(reward=str(tmp_path)))


def test_models_and_functions_go_together_in_ppo(ppo, fit, reward_folder):
    module = fit(ppo(reward=[reward_folder, lengths], reward_weights=[1.0, 0.5], learning_rate=0.0))
    samples = module.samples
    texts = [p + r for p, r in zip(samples["prompt"], samples["response"], strict=True)]
    model = ModelReward(reward_folder)(texts, [""] * 6, {})
    torch.testing.assert_close(torch.tensor(samples["reward/reward_model"]), model)
    expected = model + 0.5 * torch.tensor([float(len(r)) for r in samples["response"]])
    torch.testing.assert_close(torch.tensor(samples["reward"]), expected)


def test_a_reward_module_can_be_given_as_it_is(reward_folder):
    module = RewardModule(reward_folder)
    got = score(module, *map(list, zip(*PAIRS, strict=True)))
    torch.testing.assert_close(got.total, slow_scores(reward_folder, ids_and_eos))
    assert not any(p.requires_grad for p in module.parameters())


def test_models_are_not_loaded_before_they_are_needed(tmp_path):
    reward_terms("some/hub-id", "float32", 8)
    reward_terms("package:some_package", "float32", 8)
    reward_terms(str(tmp_path), "float32", 8)


def test_dtype_is_that_of_the_reward_models_backbone(reward_folder):
    for dtype, expected in [("float32", torch.float32), ("bfloat16", torch.bfloat16)]:
        model = ModelReward(reward_folder, dtype).to(torch.device("cpu"))
        assert {p.dtype for p in model._scorer.model.model.parameters()} == {expected}
        assert model._scorer.head.weight.dtype == torch.float32
