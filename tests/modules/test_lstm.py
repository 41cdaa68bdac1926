"""The LSTM against its gate equations written out, and its place behind the interface of every other language model."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import EOS, make_tokenizer
from scipy import stats
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_rlhf.modules import RewardModule, SFTModule
from lightning_rlhf.modules.backbone import load_causal_lm
from lightning_rlhf.modules.lstm import LSTMConfig, LSTMForCausalLM, LSTMForSequenceClassification, LSTMModel
from lightning_rlhf.modules.reading import logits_at, read
from lightning_rlhf.modules.rollout import Sampling, sample
from lightning_rlhf.modules.scorer import Scorer

SIZES = dict(vocab_size=8, hidden_size=16, embedding_size=12, num_hidden_layers=2, eos_token_id=EOS, pad_token_id=EOS)
ROWS = ([3, 1, 4, 1, 5], [2], [6, 5, 3], [7, 7, 2, 1])


def randomised(model):
    """Every weight from N(0, 1/4): biases count, and no output is near to any other."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


def make_lstm(**changes):
    return randomised(LSTMForCausalLM(LSTMConfig(**(SIZES | changes))))


@pytest.fixture(scope="session")
def lstm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a recurrent language model with eight tokens."""
    folder = tmp_path_factory.mktemp("lstm")
    make_lstm().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def lstm_reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a recurrent reward model with a normaliser."""
    folder = tmp_path_factory.mktemp("lstm_reward")
    config = LSTMConfig(**SIZES, num_labels=1, reward_mean=0.75, reward_std=2.5)
    randomised(LSTMForSequenceClassification(config)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


# --- the slow restatement: one token of one row at a time, float64 ----------------------------------------------------


def weights_of(model):
    """The weights in float64, as leaves of their own."""
    return {name: p.detach().double().requires_grad_() for name, p in model.state_dict(keep_vars=True).items()}


def slow_layer(weights, prefix, inputs):
    """Outputs (L, H) of one layer and the last h and c, from i, f, g, o = W x + U h + b."""
    w, u, b, b2 = (weights[f"{prefix}.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    size = u.shape[1]
    h = c = torch.zeros(size, dtype=torch.float64)
    outputs = []
    for x in inputs:
        gates = w @ x + b + u @ h + b2
        i, f, o = (torch.sigmoid(gates[k * size : (k + 1) * size]) for k in (0, 1, 3))
        c = f * c + i * torch.tanh(gates[2 * size : 3 * size])
        h = o * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs), h, c


def slow(weights, ids):
    """Per layer, the embeddings first: outputs (L, ·); and the (h, c) of each LSTM layer after the last token."""
    layers, states = [torch.stack([weights["model.embed_tokens.weight"][token] for token in ids])], []
    while f"model.layers.{len(states)}.lstm.weight_ih_l0" in weights:
        outputs, h, c = slow_layer(weights, f"model.layers.{len(states)}.lstm", layers[-1])
        layers.append(outputs)
        states.append((h, c))
    return layers, states


def slow_logits(weights, ids):
    """(L, V)."""
    return slow(weights, ids)[0][-1] @ weights["lm_head.weight"].T


# --- rows in a batch --------------------------------------------------------------------------------------------------


def side_by_side(rows, layout, garbage=6):
    """Ids and mask of rows of unequal length, `garbage` where the mask is 0."""
    width = max(map(len, rows)) + 3
    ids, mask = torch.full((len(rows), width), garbage), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        free = width - len(row)
        start = {"left": free, "right": 0, "both": free // 2, "holes": 0}[layout]
        columns = torch.arange(len(row)) + start
        if layout == "holes":  # the last token stands apart from the others
            columns[-1] = width - 1
        ids[number, columns], mask[number, columns] = torch.tensor(row), 1
    return ids, mask


LAYOUTS = pytest.mark.parametrize("layout", ["left", "right", "both", "holes"])


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("layers", [1, 3])
def test_follows_the_gate_equations(row, layers):
    model = make_lstm(num_hidden_layers=layers)
    out = model(torch.tensor([row]), output_hidden_states=True)
    expected, states = slow(weights_of(model), row)
    assert len(out.hidden_states) == len(expected) == layers + 1
    for got, wanted in zip(out.hidden_states, expected, strict=True):
        torch.testing.assert_close(got[0], wanted.float())
    for got, wanted in zip(out.past_key_values, states, strict=True):
        torch.testing.assert_close(torch.stack(got)[:, 0, 0], torch.stack(wanted).float())
    torch.testing.assert_close(out.logits[0], slow_logits(weights_of(model), row).float())


@LAYOUTS
def test_padding_changes_neither_outputs_nor_state(layout):
    model = make_lstm()
    ids, mask = side_by_side(ROWS, layout)
    out = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=True)
    for number, row in enumerate(ROWS):
        expected, states = slow(weights_of(model), row)
        real = mask[number].bool()
        torch.testing.assert_close(out.logits[number, real], slow_logits(weights_of(model), row).float())
        for got, wanted in zip(out.hidden_states[1:], expected[1:], strict=True):
            torch.testing.assert_close(got[number, real], wanted.float())
            assert not got[number, ~real].any()
        for got, wanted in zip(out.past_key_values, states, strict=True):
            torch.testing.assert_close(torch.stack(got)[:, 0, number], torch.stack(wanted).float())


@LAYOUTS
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_gate_equations(layout, tied):
    model = make_lstm(tie_word_embeddings=tied, embedding_size=16 if tied else 12)
    ids, mask = side_by_side(ROWS, layout)
    logits = model(ids, attention_mask=mask).logits
    logits.log_softmax(-1)[..., 2][mask.bool()].sum().backward()
    weights = weights_of(model)
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.cat([slow_logits(weights, row).log_softmax(-1)[:, 2] for row in ROWS]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-2  # it reaches every weight
        torch.testing.assert_close(parameter.grad, weights[name].grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [(1,), (2, 1), (1, 1, 1), (4,)], ids=str)
@pytest.mark.parametrize("whole_mask", [True, False])
def test_cached_tokens_continue_the_rows(pieces, whole_mask):
    model = make_lstm()
    weights = weights_of(model)
    ids, mask = side_by_side(ROWS, "left")
    state = model(ids, attention_mask=mask, use_cache=True).past_key_values
    added = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 1], [2, 2, 2, 2], [0, 1, 0, 1]])
    start = 0
    for piece in pieces:
        new = added[:, start : start + piece]
        start += piece
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        columns = mask if whole_mask else None
        out = model(new, attention_mask=columns, past_key_values=state, use_cache=True)
        state = out.past_key_values
        for number, row in enumerate(ROWS):
            expected = slow_logits(weights, row + added[number, :start].tolist())
            torch.testing.assert_close(out.logits[number], expected[-piece:].float())


def test_a_cached_row_may_pause():
    """A masked token, and a row without a single token, leave the state as it is."""
    model = make_lstm()
    weights = weights_of(model)
    ids, mask = torch.tensor([[3, 1], [6, 6]]), torch.tensor([[1, 1], [0, 0]])
    out = model(ids, attention_mask=mask, use_cache=True)
    assert not out.logits[1].any()
    for h, c in out.past_key_values:
        assert not h[:, 1].any()
        assert not c[:, 1].any()
    more = model(torch.tensor([[5, 5], [4, 2]]), torch.tensor([[0, 0], [1, 1]]), past_key_values=out.past_key_values)
    last = model(torch.tensor([[4], [7]]), past_key_values=more.past_key_values)
    for number, row in enumerate(([3, 1, 4], [4, 2, 7])):
        torch.testing.assert_close(last.logits[number, -1], slow_logits(weights, row)[-1].float())


def test_the_state_is_returned_only_if_asked_for():
    model = make_lstm()
    ids = torch.tensor([[1, 2]])
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    assert model(ids).hidden_states is None


@pytest.mark.parametrize("keep", [1, 3, 0])
def test_logits_to_keep_and_what_the_head_reads(keep):
    model = make_lstm()
    ids = torch.tensor([ROWS[0]])
    out = model(ids, logits_to_keep=keep, output_hidden_states=True)
    expected = slow_logits(weights_of(model), ROWS[0])[-keep:]
    assert out.logits.shape == (1, keep or len(ROWS[0]), 8)
    torch.testing.assert_close(out.logits[0], expected.float())
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1])[:, -keep:], out.logits)


def test_the_ways_a_network_is_read(lstm):
    model = load_causal_lm(lstm, "float32")
    weights = weights_of(model)
    prompts, responses = ([3, 1, 4], [2], [6, 5]), ([1, 5], [7, 0], [3, 2])
    ids = torch.tensor([[0] * (3 - len(p)) + p + r for p, r in zip(prompts, responses, strict=True)])
    mask = torch.tensor([[0] * (3 - len(p)) + [1] * (len(p) + 2) for p in prompts])
    tokens = torch.zeros_like(mask).bool()
    tokens[:, 3:] = True
    got = read(model, ids, mask, tokens, with_entropy=True)
    where = torch.zeros_like(mask).bool()
    where[:, 2:4] = True
    picked = logits_at(model, ids, mask, where).view(3, 2, 8)
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        row = prompt + response
        logprobs = slow_logits(weights, row)[-3:-1].log_softmax(-1)
        said = slice(2 * number, 2 * number + 2)
        torch.testing.assert_close(got.logprobs[said], logprobs[[0, 1], response].float())
        torch.testing.assert_close(got.entropy[said], -(logprobs.exp() * logprobs).sum(-1).float())
        torch.testing.assert_close(picked[number], slow_logits(weights, row)[-3:-1].float())
        torch.testing.assert_close(got.hidden[number, -3:], slow(weights, row)[0][-1][-3:].float())


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_loads_through_the_auto_classes(lstm):
    model = load_causal_lm(lstm, "float32")
    assert isinstance(model, LSTMForCausalLM)
    assert isinstance(AutoModelForCausalLM.from_pretrained(lstm), LSTMForCausalLM)
    weights = weights_of(make_lstm())  # what was saved
    torch.testing.assert_close(model(torch.tensor([ROWS[0]])).logits[0], slow_logits(weights, ROWS[0]).float())
    assert model.config.get_text_config().hidden_size == 16
    assert model.config.get_text_config().num_hidden_layers == 2
    assert {type(m).__name__ for m in model.modules()} >= set(model._no_split_modules) == {"LSTMBlock"}


def test_bfloat16_weights(lstm):
    model = load_causal_lm(lstm, "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids, mask = side_by_side(ROWS, "left")
    out = model(ids, attention_mask=mask)
    for number, row in enumerate(ROWS):
        expected = slow_logits(weights_of(model), row).bfloat16()
        torch.testing.assert_close(out.logits[number, mask[number].bool()], expected, rtol=0.05, atol=0.05)


def test_a_reward_folder_is_read_at_the_last_real_token(lstm_reward):
    assert type(AutoModelForSequenceClassification.from_pretrained(lstm_reward)) is LSTMForSequenceClassification
    scorer = Scorer.load(lstm_reward, "float32")
    assert (scorer.mean, scorer.std, scorer.head.bias) == (0.75, 2.5, None)
    weights = weights_of(scorer.model)
    for layout in ("left", "right"):
        scores = scorer(*side_by_side(ROWS, layout))
        for number, row in enumerate(ROWS):
            raw = weights["score.weight"][0] @ slow(weights, row)[0][-1][-1]
            torch.testing.assert_close(scores[number], ((raw - 0.75) / 2.5).float())


def test_a_language_model_becomes_a_reward_model(lstm, tmp_path: Path):
    scorer = Scorer.load(lstm, "bfloat16")
    assert isinstance(scorer.model.base_model, LSTMModel)
    assert scorer.head.weight.shape == (1, 16)
    assert scorer.head.weight.dtype == torch.float32
    theirs = weights_of(make_lstm())
    for name, weight in weights_of(scorer.model).items():
        if name.startswith("model."):
            torch.testing.assert_close(weight, theirs[name].bfloat16().double())
    scorer.save_pretrained(tmp_path)
    torch.testing.assert_close(Scorer.load(str(tmp_path), "float32").head.weight, scorer.head.weight)


def test_a_tied_head_stays_tied(tmp_path: Path):
    make_lstm(tie_word_embeddings=True, embedding_size=None).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), "float32")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(
        model(torch.tensor([ROWS[0]])).logits[0], slow_logits(weights_of(model), ROWS[0]).float()
    )
    with pytest.raises(ValueError, match=r"embedding_size.*12 and 16"):
        LSTMConfig(hidden_size=16, embedding_size=12, tie_word_embeddings=True)


def test_embeddings_can_be_replaced():
    model = make_lstm()
    table, head = torch.nn.Embedding(8, 12), torch.nn.Linear(16, 8, bias=False)
    model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is table is model.model.embed_tokens
    assert model.get_output_embeddings() is head
    torch.testing.assert_close(
        model(torch.tensor([ROWS[0]])).logits[0], slow_logits(weights_of(model), ROWS[0]).float()
    )


def test_new_weights_open_the_forget_gate():
    for block in LSTMForCausalLM(LSTMConfig(**SIZES)).model.layers:
        assert block.lstm.bias_ih_l0.tolist() == [0.0] * 16 + [1.0] * 16 + [0.0] * 32
        assert not block.lstm.bias_hh_l0.any()


# --- sampling ---------------------------------------------------------------------------------------------------------


def left_padded(prompts, extra=0):
    width = max(map(len, prompts)) + extra
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def test_sampling_has_the_logits_of_the_gate_equations(lstm):
    model = load_causal_lm(lstm, "float32")
    prompts, seen = [[1], [1, 5, 3], [2, 2, 6, 7, 1]], []
    hook = model.register_forward_hook(lambda module, args, out: seen.append(out.logits[:, -1]))
    rollout = sample(model, *left_padded(prompts, extra=2), Sampling(7, (EOS,), EOS), torch.Generator().manual_seed(4))
    hook.remove()
    lengths = rollout.response_mask.sum(1).tolist()
    assert len(set(lengths)) > 1
    for number, prompt in enumerate(prompts):
        row = prompt + rollout.response_ids[number, : lengths[number]].tolist()
        expected = slow_logits(weights_of(model), row)[len(prompt) - 1 : -1]
        got = torch.stack(seen[: lengths[number]])[:, number]
        torch.testing.assert_close(got.log_softmax(-1), expected.log_softmax(-1).float())


def test_sampling_draws_the_distribution_of_the_gate_equations(lstm):
    model, n = load_causal_lm(lstm, "float32"), 20_000
    ids, mask = left_padded([[1, 5, 3]], extra=1)
    sampling = Sampling(1, (EOS,), EOS, temperature=1.5)
    drawn = sample(model, ids.expand(n, -1), mask.expand(n, -1), sampling, torch.Generator().manual_seed(0))
    observed = drawn.response_ids[:, 0].bincount(minlength=8).double()
    logits = slow_logits(weights_of(model), [1, 5, 3])[-1].detach()
    expected, other = (n * (logits / temperature).softmax(-1) for temperature in (1.5, 2.0))
    assert expected.min() > 5
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    assert stats.chisquare(observed, other).pvalue < 1e-6  # it can tell


def test_generate_continues_as_the_gate_equations_do(lstm):
    model = load_causal_lm(lstm, "float32")
    prompts = [[1], [1, 5, 3], [2, 2, 6]]
    ids, mask = left_padded(prompts, extra=1)
    with torch.no_grad():
        got = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, ids.shape[1] :].tolist()
    for number, row in enumerate(prompts):
        said = list(row)
        while len(said) < len(row) + 5 and (len(said) == len(row) or said[-1] != EOS):
            said.append(int(slow_logits(weights_of(model), said)[-1].argmax()))
        assert got[number][: len(said) - len(row)] == said[len(row) :]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_passes": 2, "temperature": 0.7}], ids=str)
def test_the_first_ratio_of_ppo_is_1(ppo, fit, lstm, options):
    module = fit(ppo(model=lstm, learning_rate=0.0, **options))
    metrics = module.trainer.callback_metrics
    torch.testing.assert_close(metrics["policy/ratio"], torch.tensor(1.0))
    torch.testing.assert_close(metrics["policy/approx_kl"], torch.tensor(0.0))
    assert metrics["policy/clip_fraction"] == 0
    torch.testing.assert_close(torch.tensor(module.samples["kl"]), torch.zeros(6))


@pytest.mark.parametrize("value_network", [False, True])
def test_an_iteration_of_ppo_trains_every_weight(ppo, fit, lstm, lstm_reward, value_network):
    module = fit(ppo(model=lstm, value_model=lstm_reward if value_network else None))
    start = make_lstm().state_dict()
    assert module.trainer.global_step == 3
    for name, weight in module.policy.state_dict().items():
        assert (weight - start[name]).abs().max() > 1e-3
    if value_network:
        start = AutoModelForSequenceClassification.from_pretrained(lstm_reward).state_dict()
        for name, weight in module.value.model.state_dict().items():
            assert (weight - start[name]).abs().max() > 1e-3


def test_a_trained_policy_is_exported_as_a_folder(ppo, fit, lstm, tmp_path: Path):
    module = fit(ppo(model=lstm))
    module.save_pretrained(tmp_path)
    weights = weights_of(load_causal_lm(str(tmp_path), "float32"))
    for name, weight in module.policy.state_dict().items():
        assert torch.equal(weights[name].float(), weight)


def test_ppo_learns_the_best_letter(ppo, fit, lstm):
    def sevens(prompts, responses, **columns):
        return [response.count("\7") for response in responses]

    def expected(weights):
        """Probability of 7 after a prompt."""
        return slow_logits(weights, [1, 3]).softmax(-1)[-1, 7].item()

    module = ppo(model=lstm, reward=sevens, rollout_batch_size=32, minibatch_size=32, num_passes=2, kl_coef=0.0)
    module = fit(module, max_epochs=10)
    assert expected(weights_of(make_lstm())) < 0.3
    assert expected(weights_of(module.policy)) > 0.6


TEXTS = ([1, 2, 3, 4, 0], [5, 6, 5, 6, 0], [7, 1, 7, 1])


def test_sft_lowers_the_loss(fit, lstm):
    ids, mask = side_by_side(TEXTS, "right")
    batch = {"input_ids": ids, "attention_mask": mask, "loss_mask": mask.bool()}

    def loss(model):
        weights, nll = weights_of(model), []
        for row in TEXTS:
            logprobs = slow_logits(weights, row).log_softmax(-1)
            nll += [-logprobs[t - 1, row[t]] for t in range(1, len(row))]
        return torch.stack(nll).mean()

    module = fit(SFTModule(lstm, learning_rate=3e-2, lr_scheduler="constant"), [batch] * 20)
    assert loss(make_lstm()) > 1.0
    assert loss(module.network) < 0.5
    with torch.no_grad():
        torch.testing.assert_close(module(batch).mean(), loss(module.network).float())


def test_a_reward_model_learns_to_compare(fit, lstm):
    chosen, rejected = [[1, 2, 3], [4, 3]], [[1, 2, 5], [4, 5, 5]]
    ids, mask = side_by_side(chosen + rejected, "right")
    batch = {"input_ids": ids, "attention_mask": mask, "margin": torch.zeros(2)}
    module = fit(RewardModule(lstm, learning_rate=1e-2, lr_scheduler="constant"), [batch] * 20)
    weights = weights_of(module.network.model)
    good, bad = (
        torch.stack([weights["score.weight"][0] @ slow(weights, row)[0][-1][-1] for row in rows])
        for rows in (chosen, rejected)
    )
    assert (good - bad).min() > 1


def test_gradient_checkpointing_runs_layers_twice_and_changes_no_gradient():
    found, calls = [], []
    ids, mask = side_by_side(ROWS, "left")
    for checkpointing in (False, True):
        model = make_lstm().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        count = []
        for block in model.model.layers:
            block.lstm.register_forward_hook(lambda *_, count=count: count.append(1))
        model(ids, attention_mask=mask, use_cache=False).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        calls.append(len(count))
    assert calls == [2, 4]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_gradient_checkpointing_changes_no_iteration_of_ppo(ppo, fit, lstm):
    plain, checkpointed = (fit(ppo(model=lstm, gradient_checkpointing=flag)) for flag in (False, True))
    assert checkpointed.policy.is_gradient_checkpointing
    for name, weight in plain.policy.state_dict().items():
        torch.testing.assert_close(checkpointed.policy.state_dict()[name], weight)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_layers_compute_the_same(checkpointing):
    """FSDP2 puts other parameters in the place of those that nn.LSTM was made with."""
    ids, mask = side_by_side(ROWS, "left")
    plain, sharded = make_lstm().train(), make_lstm().train()
    if checkpointing:
        sharded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for block in sharded.model.layers:
            fully_shard(block)
        fully_shard(sharded)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, sharded)]
        for _ in range(2):
            for model, optimizer in zip((plain, sharded), optimizers, strict=True):
                optimizer.zero_grad()
                model(ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
            for (name, parameter), (other, shard) in zip(
                plain.named_parameters(), sharded.named_parameters(), strict=True
            ):
                assert name == other
                torch.testing.assert_close(shard.grad.full_tensor(), parameter.grad)
            for optimizer in optimizers:
                optimizer.step()
        got = {name: weight.full_tensor() for name, weight in sharded.state_dict().items()}
    finally:
        dist.destroy_process_group()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(got[name], weight)
        assert not torch.equal(weight, make_lstm().state_dict()[name])
