"""The faster ways to read a network, held to each sequence passed through it alone."""

import pytest
import torch
from conftest import make_llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from lightning_rlhf.functional import SampledFrom
from lightning_rlhf.modules import padding_free
from lightning_rlhf.modules.backbone import add_lora
from lightning_rlhf.modules.lstm import LSTMConfig, LSTMForCausalLM
from lightning_rlhf.modules.padding_free import VERIFIED, Packing, can_be_padding_free
from lightning_rlhf.modules.reading import FastPaths, fast_paths, logits_at, read, set_fast_paths
from lightning_rlhf.modules.scorer import Scorer

SIZES = dict(
    vocab_size=11,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    initializer_range=0.3,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
ALL_WAYS = [(True, True), (True, False), (False, True), (False, False)]
# Padding on the left, on the right, and both; a sequence without padding; one without a target. The second and the
# third begin alike; the last is the begin of the first.
IDS = torch.tensor([[0, 0, 3, 1, 4, 1], [5, 9, 2, 6, 0, 0], [0, 5, 9, 5, 0, 0], [8, 9, 7, 9, 3, 2], [3, 1, 4, 0, 0, 0]])
MASK = torch.tensor(
    [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
)
WHERE = torch.tensor(
    [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
).bool()


def tiny(kind: str, auto: type = AutoModelForCausalLM, **changes: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = AutoConfig.for_model(kind, **(SIZES | changes))
        for name in ("sliding_window", "use_sliding_window"):
            if hasattr(config, name) and name not in changes:
                setattr(config, name, None if name == "sliding_window" else False)
        return auto.from_config(config).eval()


def each_alone(model: nn.Module, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Log-probs and entropies of the tokens of WHERE in order, and last hidden states, one sequence at a time."""
    logprobs, entropies, hidden = [], [], []
    for ids, mask, where in zip(IDS, MASK.bool(), WHERE, strict=True):
        out = model(ids[mask][None], output_hidden_states=True)
        said = (out.logits[0] / temperature).log_softmax(-1)
        for t in where[mask].nonzero().flatten().tolist():
            logprobs.append(said[t - 1, ids[mask][t]])
            entropies.append(-(said[t - 1].exp() * said[t - 1]).sum())
        hidden.append(out.hidden_states[-1][0])
    return torch.stack(logprobs), torch.stack(entropies), hidden


def gradients(model: nn.Module, of: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    of.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[32, 1], ids=["one group", "groups"])
def smallest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the short sequences here lie side by side in attention, or in groups of like length."""
    monkeypatch.setattr(padding_free, "SMALLEST", request.param)


@pytest.mark.usefixtures("smallest")
@pytest.mark.parametrize("kind", sorted(VERIFIED))
def test_every_verified_kind_is_read_as_each_sequence_alone(kind):
    model = tiny(kind)
    assert can_be_padding_free(model)
    set_fast_paths(model, padding_free=True, fused_logprobs=True, fused_layers=True)
    assert fast_paths(model).padding_free
    said = read(model, IDS, MASK, WHERE, SampledFrom(0.7), with_entropy=True, hidden_at=MASK.bool())
    logprobs, entropies, hidden = each_alone(model, 0.7)
    torch.testing.assert_close(said.logprobs, logprobs)
    torch.testing.assert_close(said.entropy, entropies)
    for row, mask, expected in zip(said.hidden, MASK.bool(), hidden, strict=True):
        torch.testing.assert_close(row[mask], expected)
    weights = torch.linspace(-1, 1, len(logprobs))
    mine = gradients(model, (said.logprobs * weights + said.entropy * weights**2).sum())
    theirs = gradients(model, (logprobs * weights + entropies * weights**2).sum())
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("smallest")
@pytest.mark.parametrize("kind", sorted(VERIFIED - {"helium", "olmo", "olmo2"}))
def test_every_verified_kind_scores_as_each_sequence_alone(kind):
    scorer = Scorer(tiny(kind, AutoModelForSequenceClassification, num_labels=1))
    set_fast_paths(scorer, padding_free=True, fused_logprobs=True, fused_layers=True)
    per_token, raw = scorer.raw_per_token(IDS, MASK), scorer.raw(IDS, MASK)
    for i, (ids, mask) in enumerate(zip(IDS, MASK.bool(), strict=True)):
        expected = scorer.head(scorer.model.base_model(ids[mask][None]).last_hidden_state)[0, :, 0]
        torch.testing.assert_close(per_token[i][mask], expected)
        torch.testing.assert_close(raw[i], expected[-1])


@pytest.mark.usefixtures("smallest")
@pytest.mark.parametrize("ways", ALL_WAYS, ids=str)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_ways_say_the_same(ways, lora, checkpointing):
    model = make_llama(vocab_size=11).double()  # else rounding is what differs
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    if lora:
        model = add_lora(model, r=2, alpha=4, target_modules="all-linear")
        for name, p in model.named_parameters():
            p.data = p.data.double()
            if "lora_B" in name:
                nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    set_fast_paths(model, *ways, fused_layers=ways[0])
    assert fast_paths(model) == FastPaths(*ways)
    said = read(model, IDS, MASK, WHERE, with_entropy=True)
    logprobs, entropies, _ = each_alone(model)
    torch.testing.assert_close(said.logprobs, logprobs)
    torch.testing.assert_close(said.entropy, entropies)
    mine, theirs = (gradients(model, x.sum()) for x in (said.logprobs + said.entropy, logprobs + entropies))
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ways", ALL_WAYS, ids=str)
def test_forbidden_tokens(ways):
    model = make_llama(vocab_size=11)
    set_fast_paths(model, *ways, fused_layers=ways[0])
    first = torch.tensor([True, False, True, False, False, True, False])  # of the 7 tokens of WHERE
    said = read(model, IDS, MASK, WHERE, SampledFrom(1.0, (0, 10), first), with_entropy=True)
    logits = logits_at(model, IDS, MASK, nn.functional.pad(WHERE[:, 1:], (0, 1)))
    logits[first[:, None] & torch.tensor([i in (0, 10) for i in range(11)])] = -torch.inf
    p = logits.softmax(-1)
    torch.testing.assert_close(said.logprobs, p.gather(1, IDS[WHERE][:, None])[:, 0].log())
    torch.testing.assert_close(said.entropy, torch.special.entr(p).sum(-1))


@pytest.mark.parametrize("ways", ALL_WAYS, ids=str)
def test_logits_at(ways):
    model = make_llama(vocab_size=11)
    set_fast_paths(model, *ways, fused_layers=ways[0])
    expected = [
        model(ids[mask.bool()][None]).logits[0][w[mask.bool()]] for ids, mask, w in zip(IDS, MASK, WHERE, strict=True)
    ]
    torch.testing.assert_close(logits_at(model, IDS, MASK, WHERE), torch.cat(expected))


def tokens_seen(model: nn.Module, *args: object) -> int:
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    read(model, *args)
    hook.remove()
    return sum(seen)


def test_what_is_behind_the_last_target_is_not_computed():
    model = make_llama(vocab_size=11)
    set_fast_paths(model, True, True, True)
    assert tokens_seen(model, IDS, MASK, WHERE) == 3 + 3 + 0 + 3  # up to the token before the last target;
    # the one of the third is the second's, too
    set_fast_paths(model, False, True, True)
    assert tokens_seen(model, IDS, MASK, WHERE) == IDS.numel()


def test_a_batch_without_targets_is_still_passed_through():
    model = make_llama(vocab_size=11)
    set_fast_paths(model, True, True, True)
    said = read(model, IDS, MASK, torch.zeros_like(WHERE))
    assert said.logprobs.shape == (0,)
    said.logprobs.sum().backward()


def packed(*sequences: list[int], width: int = 6) -> Packing:
    """Of sequences with padding on the left."""
    ids = torch.tensor([[0] * (width - len(sequence)) + sequence for sequence in sequences])
    return Packing.of(torch.arange(width) >= torch.tensor([[width - len(sequence)] for sequence in sequences]), ids)


def test_sequences_of_one_length_are_not_copied():
    (group,) = packed([3, 4, 5], [6, 7, 8]).groups
    row = torch.arange(12.0).view(6, 2)
    assert group.places is None
    assert group.side_by_side(row).data_ptr() == row.data_ptr()
    assert group.side_by_side(row).tolist() == row.view(2, 3, 2).tolist()


def test_sequences_of_several_lengths():
    (group,) = packed([3, 4, 5], [6], [7, 8]).groups
    row = torch.arange(1.0, 7.0)
    padded = group.side_by_side(row)
    assert padded.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert group.in_a_row(padded).tolist() == row.tolist()
    assert torch.autograd.gradcheck(lambda x: group.side_by_side(x) ** 2, row.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda x: group.in_a_row(x) ** 2, padded.double().requires_grad_())


def test_what_sequences_begin_with_lies_in_the_row_once():
    packing = packed([7, 1, 2, 3], [7, 1, 2, 3], [5], [7, 1], [5, 6], [7, 1, 4], [1, 2, 3], width=4)
    (group,) = packing.groups  # in the order of a dictionary: 123, 5, 56, 71, 7123, 7123, 714
    assert packing.places.first.tolist() == [25, 26, 27, 11, 19, 14, 15, 2, 3, 23]
    row = torch.arange(1.0, 11.0)  # 1 2 3, 5, 6, 7 1, 2 3, 4
    padded = group.side_by_side(row)
    assert padded.tolist() == [
        [1, 2, 3, 0],
        [4, 0, 0, 0],
        [4, 5, 0, 0],
        [6, 7, 0, 0],
        [6, 7, 8, 9],
        [6, 7, 8, 9],
        [6, 7, 10, 0],
    ]
    assert group.in_a_row(padded).tolist() == row.tolist()
    in_batch = padding_free.spread(row, packing.places).view(7, 4)
    assert in_batch.tolist() == [
        [6, 7, 8, 9],
        [6, 7, 8, 9],
        [0, 0, 0, 4],
        [0, 0, 6, 7],
        [0, 0, 4, 5],
        [0, 6, 7, 10],
        [0, 1, 2, 3],
    ]
    for places in (group.places, packing.places):
        row = torch.rand(10, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, places=places: padding_free.spread(x, places) ** 2, row)


@pytest.mark.parametrize(("shared", "is_worth_it"), [(1, False), (2, True)])
def test_a_token_in_forty_is_not_worth_it(shared, is_worth_it):
    begin = list(range(1, 1 + shared))
    (group,) = packed(begin + [5] * (20 - shared), begin + [6] * (20 - shared), width=20).groups
    assert group.tokens == (40 - shared if is_worth_it else 40)
    assert (group.places is None) == (not is_worth_it)


def test_gradients_of_what_is_shared_are_added_up_in_float32():
    packing = packed(*([9, token] for token in range(8)))
    row = torch.ones(9, 1, dtype=torch.bfloat16, requires_grad=True)
    padding_free.spread(row, packing.places).backward(
        torch.tensor([1.0] + [2**-8] * 7).bfloat16().repeat_interleave(6)[:, None]
    )
    assert row.grad[0].item() == torch.tensor(1 + 7 * 2**-8).bfloat16().item()  # one by one, each would round to 1


def test_sequences_lie_next_to_those_of_like_length(monkeypatch):
    monkeypatch.setattr(padding_free, "SMALLEST", 2)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()
    packing = Packing.of(mask, torch.arange(25).view(5, 5))  # up to 2 tokens, to 2.8, to 4
    assert [group.shape for group in packing.groups] == [(2, 2), (2, 4)]
    assert [group.tokens for group in packing.groups] == [3, 7]
    assert packing.places.first.tolist() == [6, 23, 24, 0, 1, 2, 3, 16, 17, 18]


@pytest.mark.parametrize(("tokens", "shapes"), [(32, [(2, 32)]), (33, [(1, 20), (1, 33)]), (46, [(1, 20), (1, 46)])])
def test_short_sequences_are_one_group(tokens, shapes):
    mask = torch.arange(tokens) < torch.tensor([[20], [tokens]])
    assert [group.shape for group in Packing.of(mask, torch.zeros_like(mask, dtype=torch.long)).groups] == shapes


class Changed(LlamaForCausalLM):
    """A model that calls itself a Llama and may be anything."""


def test_unknown_models_are_read_plainly():
    windowed = tiny("mistral", sliding_window=3)
    mixed = tiny("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1)
    scaled = tiny("granite", logits_scaling=2.0)
    lstm = LSTMForCausalLM(LSTMConfig(vocab_size=11, hidden_size=8))
    eager = tiny("llama")
    eager.set_attn_implementation("eager")
    for model in (windowed, mixed, scaled, lstm, eager, Changed(make_llama(vocab_size=11).config)):
        set_fast_paths(model, True, True, True)
        assert fast_paths(model) == FastPaths(False, False)
        said = read(model.eval(), IDS, MASK, WHERE)
        torch.testing.assert_close(said.logprobs, each_alone_of(model))
    with_bias = tiny("phi")  # its head has one
    set_fast_paths(with_bias, True, True, True)
    assert fast_paths(with_bias) == FastPaths(True, False)


def each_alone_of(model: nn.Module) -> torch.Tensor:
    found = []
    for ids, mask, where in zip(IDS, MASK.bool(), WHERE, strict=True):
        said = model(ids[mask][None]).logits[0].log_softmax(-1)
        found += [said[t - 1, ids[mask][t]] for t in where[mask].nonzero().flatten().tolist()]
    return torch.stack(found)


def test_a_head_is_as_it_was_after_it_was_read():
    model = make_llama(vocab_size=11)
    set_fast_paths(model, True, True, True)
    before = model(IDS, MASK).logits
    read(model, IDS, MASK, WHERE)
    torch.testing.assert_close(model(IDS, MASK).logits, before, rtol=0, atol=0)
    with pytest.raises(IndexError):
        read(model, IDS + 100, MASK, WHERE)
    torch.testing.assert_close(model(IDS, MASK).logits, before, rtol=0, atol=0)


def test_the_attention_stays_out_of_saved_configurations(tmp_path):
    model = make_llama(vocab_size=11)
    set_fast_paths(model, True, True, True)
    model.save_pretrained(tmp_path)
    assert "padding_free" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
