"""Rewards by reward models: one, and ensembles of several."""

import pytest
import torch
from adapters import save_reward_adapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lightning_rlhf.modules import RewardModule
from lightning_rlhf.modules.backbone import add_lora, load_causal_lm
from lightning_rlhf.modules.reward_models import EnsembleReward, ModelReward
from lightning_rlhf.modules.reward_terms import Responses
from lightning_rlhf.modules.scorer import Scorer
from lightning_rlhf.modules.scoring import WeightedRewards, reward_terms
from lightning_rlhf.modules.sharing import SharedBase


def lengths(prompts, responses, **columns):
    return [len(r) for r in responses]


def score(spec, prompts, responses, batch_size=32):
    return WeightedRewards(reward_terms(spec, "float32", batch_size))(Responses(prompts, responses))


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
    model = ModelReward(reward_folder)(Responses(texts, [""] * 6))
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


# --- on the policy's base, in 4 bits ------------------------------------------------------------------------------


@pytest.fixture
def adapters(policy, tmp_path) -> list[str]:
    """Two reward models' adapters on the policy's base model."""
    return [save_reward_adapter(policy, tmp_path / name, seed) for seed, name in enumerate("ab")]


def test_reward_models_with_the_policys_base_stand_on_it(policy, adapters):
    network = add_lora(load_causal_lm(policy, "float32"), 4, 8, "all-linear")
    in_policy = {id(p) for p in network.parameters()}
    base = SharedBase(network, policy, "float32")
    given = Responses(*map(list, zip(*PAIRS, strict=True)))
    terms = WeightedRewards([ModelReward(adapters[0]), EnsembleReward(adapters)])
    terms.to(torch.device("cpu"), None, base)
    members = [terms.terms["reward_model"], *terms.terms["ensemble"].members]
    for member, folder in zip(members, [adapters[0], *adapters], strict=True):
        own = [name for name, p in member._scorer.named_parameters() if id(p) not in in_policy]
        assert all("lora_" in name or name.endswith("score.weight") for name in own)
        assert not any(p.requires_grad for p in member._scorer.parameters())
        assert not any(module.training for module in member._scorer.modules())
        torch.testing.assert_close(member(given), ModelReward(folder)(given))
    assert all(p.requires_grad == ("lora_" in name) for name, p in network.named_parameters())


def test_a_model_that_is_loaded_stays_what_it_is(policy, adapters):
    reward = ModelReward(adapters[0]).to(torch.device("cpu"))
    loaded = reward._scorer
    network = add_lora(load_causal_lm(policy, "float32"), 4, 8, "all-linear")
    reward.to(torch.device("cpu"), None, SharedBase(network, policy, "float32"))
    assert reward._scorer is loaded


def test_4_bits_are_for_those_who_ask_for_them(reward_folder, monkeypatch):
    asked = []

    def load(spec, dtype, load_in_4bit, base):
        asked.append(load_in_4bit)
        return Scorer.load(spec, dtype)

    monkeypatch.setattr("lightning_rlhf.modules.reward_models.load_scorer", load)
    for flag in (False, True):
        ModelReward(reward_folder, load_in_4bit=flag).to(torch.device("cpu"))
        EnsembleReward([reward_folder] * 2, load_in_4bit=flag).to(torch.device("cpu"))
    assert asked == [False] * 3 + [True] * 3


def test_4_bits_without_a_gpu_are_refused(reward_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="`load_in_4bit` must be False on a machine without an NVIDIA GPU"):
        ModelReward(reward_folder, load_in_4bit=True).to(torch.device("cpu"))


# --- ensembles ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_folder(reward_folder, tmp_path_factory) -> str:
    """Another reward model: the head points elsewhere, the normaliser differs."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    model.score.weight.data = model.score.weight.data.roll(3, dims=1) * 2
    model.config.reward_mean = -0.5
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(reward_folder).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def members(reward_folder, other_folder) -> list[list[float]]:
    """Scores of three members, of which two are the same model; each by itself."""
    given = Responses(*map(list, zip(*PAIRS, strict=True)))
    one, two = (ModelReward(folder)(given).tolist() for folder in (reward_folder, other_folder))
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) > 0.1
    return [one, two, one]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_an_ensemble_pays_for_disagreement(reward_folder, other_folder, members, penalty):
    ensemble = EnsembleReward([reward_folder, other_folder, reward_folder], uncertainty_penalty=penalty)
    scores = WeightedRewards([ensemble])(Responses(*map(list, zip(*PAIRS, strict=True))))
    means, stds = [], []
    for values in zip(*members, strict=True):
        means.append(sum(values) / 3)
        stds.append((sum((v - means[-1]) ** 2 for v in values) / 3) ** 0.5)
    assert scores.components.keys() == {"ensemble", "ensemble/mean", "ensemble/std"}
    torch.testing.assert_close(scores.components["ensemble/mean"], torch.tensor(means))
    torch.testing.assert_close(scores.components["ensemble/std"], torch.tensor(stds))
    expected = torch.tensor([m - penalty * s for m, s in zip(means, stds, strict=True)])
    torch.testing.assert_close(scores.total, expected)
    torch.testing.assert_close(scores.components["ensemble"], expected)


def test_a_conservative_ensemble_believes_its_worst_member(reward_folder, other_folder, members):
    ensemble = EnsembleReward([reward_folder, other_folder], conservative=True)
    scores = ensemble(Responses(*map(list, zip(*PAIRS, strict=True))))
    torch.testing.assert_close(scores.total, torch.tensor([min(values) for values in zip(*members, strict=True)]))


def test_members_that_agree_are_one_model(reward_folder):
    given = Responses(*map(list, zip(*PAIRS, strict=True)))
    scores = EnsembleReward([reward_folder] * 2, uncertainty_penalty=7.0)(given)
    torch.testing.assert_close(scores.total, ModelReward(reward_folder)(given))


def test_ensembles_train_and_take_the_modules_dtype_and_chunks(ppo, fit, reward_folder, other_folder):
    spec = {
        "class_path": "lightning_rlhf.modules.scoring.EnsembleReward",
        "init_args": {"models": [reward_folder, other_folder], "uncertainty_penalty": 0.5},
    }
    module = fit(ppo(reward=spec, dtype="bfloat16", forward_batch_size=5, learning_rate=0.0))
    samples = module.samples
    expected = [
        m - 0.5 * s for m, s in zip(samples["reward/ensemble/mean"], samples["reward/ensemble/std"], strict=True)
    ]
    torch.testing.assert_close(torch.tensor(samples["reward"]), torch.tensor(expected))
    ensemble = module.rewards.terms["ensemble"]
    assert {(m._dtype, m._batch_size) for m in ensemble.members} == {("bfloat16", 5)}
    (own,) = reward_terms({**spec, "init_args": spec["init_args"] | {"dtype": "float32"}}, "bfloat16", 8)
    assert {(m._dtype, m._batch_size) for m in own.members} == {("float32", 8)}


def test_to_moves_every_member(reward_folder, other_folder):
    ensemble = (
        WeightedRewards([EnsembleReward([reward_folder, other_folder])]).to(torch.device("meta")).terms["ensemble"]
    )
    assert {m._scorer.head.weight.device.type for m in ensemble.members} == {"meta"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["a"]}, r"`models` must be a list of at least two reward models, but got \['a'\]"),
        ({"models": "ab"}, "`models` must be a list of at least two reward models, but got 'ab'"),
        ({"models": ["a", "b"], "uncertainty_penalty": -1.0}, "`uncertainty_penalty` must be at least 0, but got -1.0"),
    ],
)
def test_what_is_no_ensemble_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleReward(**options)


def test_a_model_whose_score_is_not_finite_is_named_with_the_sample(reward_folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    model.model.embed_tokens.weight.data[3] = torch.nan
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(reward_folder).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"The reward `reward_model` returned nan for sample 0: prompt '\\x01\\x02', resp"
    ):
        score(str(tmp_path), *map(list, zip(*PAIRS, strict=True)))
