"""On-policy methods once more, slowly: float64, one sequence at a time, no padding, no cache; and more for tests."""

import math

import lightning as L
import torch
from conftest import EOS

# --- sequences ----------------------------------------------------------------------------------------------------


def real(ids, mask):
    """The ids under the mask, as a list."""
    return [int(i) for i, m in zip(ids, mask, strict=True) if m]


def sequences(e):
    """(prompt, response) of each row of an experience."""
    columns = zip(e.prompt_ids, e.prompt_mask, e.response_ids, e.response_mask, strict=True)
    return [(real(p, pm), real(r, rm)) for p, pm, r, rm in columns]


def softmaxes(network, module, prompt, response):
    """Log-probabilities (T, V) and hidden states before each token and after the last."""
    h = module.hparams
    out = network(input_ids=torch.tensor([prompt + response]), output_hidden_states=True, use_cache=False)
    logits = out.logits[0, len(prompt) - 1 : -1].double() / h.temperature
    barred = torch.zeros_like(logits)
    barred[: h.min_new_tokens, EOS] = -torch.inf
    return (logits + barred).log_softmax(-1), out.hidden_states[-1][0, len(prompt) - 1 :]


@torch.no_grad()
def slow_logprobs(network, module, prompt, response):
    """Log-probability of each response token, as a list."""
    logs, _ = softmaxes(network, module, prompt, response)
    return [logs[t, token].item() for t, token in enumerate(response)]


def letters_of(e):
    """The reward `letters` of the module tests, from the ids."""
    return [sum((i * 7 % 5) - 1.5 for i in response if i != EOS) / 2 for _, response in sequences(e)]


def padded(rows, width):
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])


# --- from scores to advantages ------------------------------------------------------------------------------------

KL = {
    "k1": lambda p, r: p - r,
    "k2": lambda p, r: (p - r) ** 2 / 2,
    "k3": lambda p, r: math.exp(r - p) - 1 - (r - p),
}


def moments(rows):
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)


def slow_scores(h, scores, responses):
    """The shaped scores of a run's first iteration."""
    if h.normalize_scores:
        mean = sum(scores) / len(scores)
        std = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
        scores = [(s - mean) / std for s in scores]
    shaped = []
    for score, response in zip(scores, responses, strict=True):
        if h.score_clip is not None:
            score = min(max(score, -h.score_clip), h.score_clip)
        if h.overlong_buffer:
            over = len(response) - (h.max_new_tokens - h.overlong_buffer)
            score -= max(over, 0) / h.overlong_buffer
        shaped.append(score if response[-1] == EOS else score - h.missing_eos_penalty)
    return shaped


def slow_rewards(scores, kls, kl_coef):
    """Per token: -β KL, and the score on the last."""
    rows = [[-kl_coef * x for x in row] for row in kls]
    for row, score in zip(rows, scores, strict=True):
        row[-1] += score
    return rows


def slow_whitened(rows):
    mean, std = moments(rows)
    return [[(x - mean) / std for x in row] for row in rows]


def slow_relative(rows, size, compare):
    """Each response's sum of rewards held against its group's, at every token."""
    totals, found = [sum(row) for row in rows], []
    for i, row in enumerate(rows):
        start = i // size * size
        found.append([compare(totals[start : start + size], i - start)] * len(row))
    return found


def centered(group, i):
    return group[i] - sum(group) / len(group)


def normalized(group, i, eps=1e-4):
    mean = sum(group) / len(group)
    return (group[i] - mean) / (math.sqrt(sum((x - mean) ** 2 for x in group) / (len(group) - 1)) + eps)


def against_the_others(group, i):
    others = [x for j, x in enumerate(group) if j != i]
    return group[i] - sum(others) / len(others)


def slow_returns(rows, gamma=1.0):
    """Σ_k γ^k of the rewards still to come."""
    return [[sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))] for row in rows]


ADVANTAGES = {  # of rewards per token as ragged lists, and the group size
    "GroupNormalized": lambda rows, size: slow_relative(rows, size, normalized),
    "GroupCentered": lambda rows, size: slow_relative(rows, size, centered),
    "LeaveOneOut": lambda rows, size: slow_relative(rows, size, against_the_others),
    "WhitenedReturns": lambda rows, size: slow_whitened(slow_returns(rows)),
    "WhitenedGroupScores": lambda rows, size: slow_whitened(slow_relative(rows, size, centered)),
}

# --- losses, differentiable ---------------------------------------------------------------------------------------


def slow_clipped(log_ratios, advantages, low, high, of_sequence=False):
    """PPO's loss of each token of one response; with `of_sequence` all have the geometric mean of their ratios."""
    if of_sequence:
        log_ratios = [sum(log_ratios) / len(log_ratios)] * len(log_ratios)
    ratios = [log_ratio.exp() for log_ratio in log_ratios]
    return [-torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a) for r, a in zip(ratios, advantages, strict=True)]


AGGREGATIONS = {  # of losses per token as ragged lists; the length of FixedLengthMean is 7
    "TokenMean": lambda rows: sum(x for row in rows for x in row) / sum(len(row) for row in rows),
    "SequenceMean": lambda rows: sum(sum(row) / len(row) for row in rows) / len(rows),
    "FixedLengthMean": lambda rows: sum(x for row in rows for x in row) / (7 * len(rows)),
}


def slow_entropy(logs):
    possible = logs[logs > -torch.inf]
    return -(possible.exp() * possible).sum()


# --- modules ------------------------------------------------------------------------------------------------------


def experience_of(module):
    return module._experience.experience


def silent(module):
    """The module without a Trainer: it logs nothing."""
    module.configure_model()
    module.log = lambda *_, **__: None
    return module


def copy_of(module, **options):
    """Another module with the same weights."""
    other = type(module)(module._model_spec, **options)
    other.configure_model()
    other.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("_running")})
    return other


def moved_policy(module, scale=0.1):
    """The module with a policy that is away from its reference."""
    module.configure_model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def gradient_of(module, e):
    """The summed loss of a minibatch, and the gradient with which an optimizer step would be made."""
    module.zero_grad()
    loss = module.training_step(e, 0)
    loss.backward()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.on_before_optimizer_step(optimizer)
    module.configure_gradient_clipping(optimizer)
    return loss.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def with_garbage(e):
    """Two more columns of prompt and three of response; noise wherever nothing counts."""
    noise = torch.Generator().manual_seed(1)
    prompt_mask = torch.nn.functional.pad(e.prompt_mask, (2, 0))
    response_mask = torch.nn.functional.pad(e.response_mask, (0, 3))

    def dirty(name, x):
        mask, widths = (prompt_mask, (2, 0)) if name.startswith("prompt") else (response_mask, (0, 3))
        if x.ndim < 2:
            return x
        if x.dtype == torch.bool:
            return mask
        wide = torch.nn.functional.pad(x, widths)
        if x.is_floating_point():
            return wide.where(mask, 5 * torch.randn(mask.shape, generator=noise))
        return wide.where(mask, torch.randint(8, mask.shape, generator=noise))

    return type(e)(**{name: dirty(name, x) for name, x in e._asdict().items()})


def bits(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def saved(module, path):
    module.trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


class SaveAt(L.Callback):
    """Writes a checkpoint behind an optimizer step, wherever in an epoch that is."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def logged(module):
    """What was logged last, without what depends on the clock."""
    metrics = {k: v.item() for k, v in module.trainer.callback_metrics.items()}
    return {k: v for k, v in metrics.items() if not k.startswith(("time/", "throughput/"))}


def ones(prompts, responses, **columns):
    """A reward: whether there is a 1 in a response. Groups often tie."""
    return [float("\1" in response) for response in responses]
