"""Sampling: the distribution, the cache, padding, EOS, and text."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, make_llama, make_tokenizer
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

from lightning_rlhf.functional import token_logprobs
from lightning_rlhf.modules.decoding import RoomyLayer
from lightning_rlhf.modules.lstm import LSTMConfig, LSTMForCausalLM
from lightning_rlhf.modules.ppo import PPOExperience
from lightning_rlhf.modules.reading import fast_paths, set_fast_paths
from lightning_rlhf.modules.rollout import Rollout, Sampling, sample, texts, trimmed

PROMPT = [1, 5, 3]


@pytest.fixture(scope="module")
def model():
    return make_llama(vocab_size=8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def left_padded(*prompts, extra=0):
    length = max(map(len, prompts)) + extra
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts])
    return ids, torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])


def next_token_probabilities(model, ids, temperature=1.0):
    """softmax(logits / T) after some ids, without a cache, in float64."""
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)


def p_value(drawn, probabilities):
    """Of a chi-square test; rare tokens are one class."""
    expected = probabilities * len(drawn)
    observed = torch.bincount(drawn, minlength=len(probabilities)).double()
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    assert observed[~kept].sum() == 0
    return stats.chisquare(observed[kept], expected[kept]).pvalue


def by_steps(model):
    """The model, its attention of one new token written out."""
    copied = copy.deepcopy(model)
    set_fast_paths(copied, padding_free=True, fused_logprobs=True, fused_layers=True)
    assert fast_paths(copied).padding_free
    return copied


@pytest.mark.parametrize(("compact", "written_out"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_tokens_follow_the_softmax_at_the_temperature(model, temperature, compact, written_out):
    n, plain = 20_000, model
    model = by_steps(model) if written_out else model
    ids, mask = left_padded(PROMPT, extra=1)
    sampling = Sampling(2, (EOS,), EOS, temperature=temperature)
    prompts = ids.expand(n, -1), mask.expand(n, -1)
    drawn = sample(model, *prompts, sampling, generator(), compact=compact).response_ids
    assert p_value(drawn[:, 0], next_token_probabilities(plain, PROMPT, temperature)) > 1e-3
    assert p_value(drawn[:, 0], next_token_probabilities(plain, PROMPT, temperature * 1.15)) < 1e-6  # it can tell
    tested = 0
    for first in range(1, 8):
        second = drawn[drawn[:, 0] == first, 1]
        if len(second) > 500:
            tested += 1
            assert p_value(second, next_token_probabilities(plain, [*PROMPT, first], temperature)) > 1e-3
    assert tested >= 2


def test_minimum_length_renormalises_without_eos(model):
    n = 20_000
    ids, mask = left_padded(PROMPT)
    sampling = Sampling(2, (EOS, 4), EOS, min_new_tokens=1)
    drawn = sample(model, ids.expand(n, -1), mask.expand(n, -1), sampling, generator()).response_ids[:, 0]
    probabilities = next_token_probabilities(model, PROMPT)
    probabilities[[EOS, 4]] = 0
    assert p_value(drawn, probabilities / probabilities.sum()) > 1e-3


def test_no_eos_before_the_minimum_length(model):
    ids, mask = left_padded(PROMPT)
    free, held = (
        sample(model, ids.expand(500, -1), mask.expand(500, -1), Sampling(6, (EOS,), EOS, m), generator())
        for m in (0, 3)
    )
    assert free.response_mask.sum(1).min() == 1
    assert held.response_mask.sum(1).min() == 4  # three tokens, then EOS at the earliest
    assert not (held.response_ids[:, :3] == EOS).any()


def test_constrained_logprobs_know_the_minimum_length():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logits = torch.tensor([1.0, 2.0, 4.0]).log().expand(4, 3)  # of the tokens of the mask, row by row
    early, late = [0, 2 / 6, 4 / 6], [1 / 7, 2 / 7, 4 / 7]
    constrained = Sampling(3, (0,), 0, min_new_tokens=2).of_tokens(mask).constrain(logits)
    torch.testing.assert_close(constrained.softmax(-1), torch.tensor([early, early, late, early]))
    assert Sampling(3, (0,), 0).of_tokens(mask).constrain(logits) is logits


@pytest.mark.parametrize("kind", ["rotary", "learned positions", "written out"])
def test_cached_decoding_has_the_logits_of_the_full_forward(model, learned_positions, kind):
    plain = learned_positions if kind == "learned positions" else model
    model = by_steps(plain) if kind == "written out" else plain
    ids, mask = left_padded([1], PROMPT, [2, 2, 6, 7, 1], extra=1)
    for seed in range(20):  # the first noise with which the lengths differ
        seen = []
        hook = model.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.logits[:, -1]))
        rollout = sample(model, ids, mask, Sampling(7, (EOS,), EOS), generator(seed), compact=False)
        hook.remove()
        if len(set(rollout.response_mask.sum(1).tolist())) > 1:
            break
    whole = torch.cat([ids, rollout.response_ids], 1), torch.cat([mask, rollout.response_mask.long()], 1)
    with torch.no_grad():
        positions = (whole[1].cumsum(1) - 1).clamp(min=0)
        full = plain(whole[0], attention_mask=whole[1], position_ids=positions).logits[:, -8:-1]
    steps = len(seen)
    counts = rollout.response_mask[:, :steps]
    assert counts.sum() > 6
    assert len(set(counts.sum(1).tolist())) > 1
    got = token_logprobs(torch.stack(seen, 1), rollout.response_ids[:, :steps])
    torch.testing.assert_close(got[counts], token_logprobs(full, rollout.response_ids)[:, :steps][counts])
    torch.testing.assert_close(rollout.sampled_logprobs[:, :steps][counts], got[counts])
    assert not rollout.sampled_logprobs[~rollout.response_mask].any()


@pytest.mark.parametrize("kind", ["rotary", "learned positions"])
@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, [4], [2, 6, 6, 1]]])
def test_left_padding_changes_no_sample(model, learned_positions, prompts, kind):
    model = model if kind == "rotary" else learned_positions
    sampling = Sampling(8, (EOS,), EOS)
    bare, padded = (sample(model, *left_padded(*prompts, extra=e), sampling, generator(2)) for e in (0, 5))
    assert torch.equal(bare.response_ids, padded.response_ids)
    assert torch.equal(bare.response_mask, padded.response_mask)


def test_ids_under_the_prompt_mask_change_no_sample(model):
    ids, mask = left_padded([4], PROMPT)
    other = ids.masked_fill(mask == 0, 6)
    sampling = Sampling(8, (EOS,), EOS)
    assert torch.equal(
        sample(model, ids, mask, sampling, generator()).response_ids,
        sample(model, other, mask, sampling, generator()).response_ids,
    )


def test_generation_config_changes_no_sample():
    model = make_llama(vocab_size=8)
    ids, mask = left_padded(*[PROMPT] * 50)
    plain = sample(model, ids, mask, Sampling.of(model, make_tokenizer(), 5), generator())
    changes = dict(top_p=0.1, top_k=1, repetition_penalty=9.0, temperature=0.1, max_new_tokens=2, min_new_tokens=4)
    for name, value in changes.items():
        setattr(model.generation_config, name, value)
    again = sample(model, ids, mask, Sampling.of(model, make_tokenizer(), 5), generator())
    assert torch.equal(plain.response_ids, again.response_ids)


def test_eos_ids_are_those_of_generation_config_and_tokenizer():
    model = make_llama(vocab_size=8)
    for given, expected in [(None, (0,)), (0, (0,)), (3, (0, 3)), ([5, 3], (0, 3, 5))]:
        model.generation_config.eos_token_id = given
        sampling = Sampling.of(model, make_tokenizer(), 5, temperature=0.5)
        assert sampling == Sampling(5, expected, EOS, 0, 0.5)


def test_randomness_is_the_generators_alone(model):
    ids, mask = left_padded(*[PROMPT] * 20)
    sampling = Sampling(4, (EOS,), EOS)
    before = torch.get_rng_state()
    first = sample(model, ids, mask, sampling, generator(1)).response_ids
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(sample(model, ids, mask, sampling, generator(1)).response_ids, first)
    assert not torch.equal(sample(model, ids, mask, sampling, generator(2)).response_ids, first)
    torch.manual_seed(1)
    assert torch.equal(sample(model, ids, mask, sampling).response_ids, first)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored_and_checkpointing_does_not_matter(training):
    model = make_llama(vocab_size=8)
    ids, mask = left_padded(*[PROMPT] * 9)
    expected = sample(model.eval(), ids, mask, Sampling(5, (EOS,), EOS), generator()).response_ids
    model.train(training).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = sample(model, ids, mask, Sampling(5, (EOS,), EOS), generator())
    assert model.training is training
    assert torch.equal(got.response_ids, expected)


class Script(nn.Module):
    """A language model that can say only what is written."""

    def __init__(self, *lines):
        super().__init__()
        self.lines, self.calls = torch.tensor(lines), 0

    def forward(self, input_ids, past_key_values, **_):
        logits = torch.full((len(self.lines), 1, 10), -1e9)
        logits[:, 0].scatter_(1, self.lines[:, self.calls, None], 0.0)
        self.calls += 1
        return SimpleNamespace(logits=logits, past_key_values=None)


def play(sampling, *lines):
    script = Script(*lines)
    ids, mask = left_padded(*[[1]] * len(lines))
    return sample(script, ids, mask, sampling), script


@pytest.mark.parametrize("pad", [0, 9])  # 0 is EOS
def test_what_follows_the_eos_is_padding(pad):
    rollout, _ = play(Sampling(4, (0,), pad), [5, 0, 6, 7], [5, 6, 7, 8], [0, 6, 6, 6], [5, 6, 7, 0])
    assert rollout.response_ids.tolist() == [[5, 0, pad, pad], [5, 6, 7, 8], [0, pad, pad, pad], [5, 6, 7, 0]]
    assert rollout.response_mask.sum(1).tolist() == [2, 4, 1, 4]
    assert rollout.response_mask[0].tolist() == [True, True, False, False]
    assert rollout.ended.tolist() == [True, False, True, True]


def test_every_eos_id_ends_a_response():
    rollout, _ = play(Sampling(3, (0, 4), 9), [5, 4, 6], [5, 0, 6], [5, 6, 7])
    assert rollout.response_ids.tolist() == [[5, 4, 9], [5, 0, 9], [5, 6, 7]]
    assert rollout.ended.tolist() == [True, True, False]


@pytest.mark.parametrize("pad", [0, 9])
def test_sampling_stops_when_all_ended_and_pads_to_the_full_length(pad):
    rollout, script = play(Sampling(6, (0,), pad), [5, 0, 6, 6, 6, 6], [5, 7, 0, 6, 6, 6])
    assert script.calls == 3
    assert rollout.response_ids.tolist() == [[5, 0, pad, pad, pad, pad], [5, 7, 0, pad, pad, pad]]
    assert rollout.response_mask.sum(1).tolist() == [2, 3]
    assert rollout.ended.all()


def test_one_token_is_a_response():
    rollout, _ = play(Sampling(1, (0,), 0), [5], [0])
    assert rollout.response_ids.tolist() == [[5], [0]]
    assert rollout.ended.tolist() == [False, True]


def rollout_of(prompts, responses, ended):
    ids, mask = left_padded(*prompts)
    length = max(map(len, responses))
    return Rollout(
        ids,
        mask.bool(),
        torch.tensor([r + [0] * (length - len(r)) for r in responses]),
        torch.tensor([[True] * len(r) + [False] * (length - len(r)) for r in responses]),
        torch.tensor(ended),
        torch.zeros(len(responses), length),
    )


def test_texts_are_without_eos_and_padding():
    codes = [[ord(c) for c in text] for text in (" is good", "", "no end")]
    rollout = rollout_of([[65], [66, 67], [32]], [[*codes[0], 0], [0], codes[2]], [True, True, False])
    assert texts(rollout, make_tokenizer()) == [" is good", "", "no end"]


def test_texts_keep_a_leading_space_that_the_tokenizer_would_drop():
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "▁the": 1, "▁film": 2, "s": 3}, unk_token="s"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    assert fast.decode([2, 3]) == "films"  # so it does
    rollout = rollout_of([[1], [1, 2]], [[2, 3, 0], [3, 1, 2]], [True, False])
    assert texts(rollout, fast) == [" films", "s the film"]


# --- compact ------------------------------------------------------------------------------------------------------


def rows_per_pass(model, *args, **kwargs):
    """A rollout, and how many rows each of its forward passes had."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    rollout = sample(model, *args, **kwargs)
    hook.remove()
    return rollout, seen


@pytest.mark.parametrize("kind", ["rotary", "learned positions"])
@pytest.mark.parametrize("copies", [1, 4])
def test_compact_rollouts_are_the_same_rollouts(model, learned_positions, kind, copies):
    model = model if kind == "rotary" else learned_positions
    ids, mask = left_padded([1, 5, 3], [4], [0, 4], [2, 6, 6, 1], [4], extra=1)
    ids, mask = (x.repeat_interleave(copies, dim=0) for x in (ids, mask))
    sampling, noise = Sampling(20, (EOS, 3), EOS), torch.rand(len(ids), 20, generator=generator(5), dtype=torch.float64)
    (plain, whole), (compact, fewer) = (
        rows_per_pass(model, ids, mask, sampling, noise, compact=c) for c in (False, True)
    )
    for mine, theirs in zip(compact[:-1], plain[:-1], strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(compact.sampled_logprobs, plain.sampled_logprobs)
    assert len(set(plain.response_mask.sum(1).tolist())) > 2
    assert whole == [len(ids)] * len(whole)
    assert fewer[0] == 5  # each prompt once: [4] and [0, 4] are two, and so are prompts that do not stand together
    assert fewer[1:] == sorted(fewer[1:], reverse=True)
    assert fewer[-1] < fewer[1] <= len(ids)


@pytest.mark.parametrize("most", [40, 10])
def test_a_cache_with_room_holds_what_one_without_does(most):
    tensors = torch.arange(2 * 3 * 2 * 40 * 4.0).view(2, 3, 2, 40, 4)  # keys and values of 3 rows, 2 heads, 40 tokens
    roomy, plain = RoomyLayer(most), DynamicLayer()
    seen, rows = 0, torch.arange(3)
    for count, chosen in ((7, None), (1, [0, 2, 2]), (1, None), (9, [1]), (1, None), (8, None)):
        new = tensors[:, rows][..., seen : seen + count, :]
        for mine, theirs in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(mine, theirs)
        seen += count
        assert roomy.get_seq_length() == seen
        if chosen is not None:
            rows = rows[chosen]
            for layer in (roomy, plain):
                layer.batch_select_indices(torch.tensor(chosen))
    start = roomy.keys.data_ptr()
    roomy.update(*tensors[:, rows][..., :1, :])
    had_room = roomy.keys.data_ptr() == start
    assert had_room == (most == 40)
    assert roomy.rooms[0].shape[2] <= max(most, roomy.get_seq_length())


def test_the_last_rows_wait_for_other_ranks(model):
    ids, mask = left_padded([1, 5], [2, 3])
    sampling = Sampling(6, tuple(range(8)), EOS)  # every token ends a response
    rollout, rows = rows_per_pass(model, ids, mask, sampling, generator(), any_rank=lambda flag: torch.tensor(True))
    assert rows == [2] * 6
    assert rollout.response_mask.sum(1).tolist() == [1, 1]
    _, alone = rows_per_pass(model, ids, mask, sampling, generator(), any_rank=lambda flag: flag)
    assert alone == [2]


def test_a_model_without_a_cache_of_keys_keeps_its_rows(tmp_path):
    torch.manual_seed(0)
    lstm = LSTMForCausalLM(LSTMConfig(vocab_size=8, hidden_size=8, initializer_range=0.5)).eval()
    ids, mask = (x.repeat_interleave(3, dim=0) for x in left_padded([1, 5, 3], [4]))
    sampling, noise = Sampling(9, (EOS,), EOS), torch.rand(6, 9, generator=generator(), dtype=torch.float64)
    plain, compact = (sample(lstm, ids, mask, sampling, noise, compact=c) for c in (False, True))
    for mine, theirs in zip(compact, plain, strict=True):
        assert torch.equal(mine, theirs)
    assert len(set(plain.response_mask.sum(1).tolist())) > 1


def test_trimmed_leaves_out_the_columns_without_a_token():
    prompt_mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    response_mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    number = torch.arange(8.0).view(2, 4)
    whole = PPOExperience(number, prompt_mask, number, response_mask, number, number, number, number)
    got = trimmed(whole)
    assert got.prompt_ids.tolist() == [[2, 3], [6, 7]]
    assert got.prompt_mask.tolist() == [[True, True], [False, True]]
    assert got.response_mask.tolist() == [[True, True], [True, False]]
    for field in (got.response_ids, got.logprobs, got.values, got.advantages, got.returns):
        assert field.tolist() == [[0, 1], [4, 5]]
    rollout = trimmed(Rollout(number, prompt_mask, number, response_mask, torch.tensor([True, False]), number.float()))
    assert rollout.ended.tolist() == [True, False]
    assert rollout.response_ids.shape == rollout.sampled_logprobs.shape == (2, 2)
