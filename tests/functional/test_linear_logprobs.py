"""Log-probabilities from hidden states, held to the logits written out and to autograd's own gradient."""

import pytest
import torch
from torch import Tensor

from lightning_rlhf.functional import SampledFrom, linear_logprobs
from lightning_rlhf.functional import linear_logprobs as function

module = __import__(function.__module__, fromlist=["BLOCK"])
N, H, V = 7, 5, 11
TOKENS = torch.tensor([1, 10, 4, 4, 0, 7, 2])
EARLY = torch.tensor([True, False, True, True, False, False, True])
CASES = {
    "plain": SampledFrom(),
    "temperature": SampledFrom(0.7),
    "forbidden": SampledFrom(1.3, (3, 9), EARLY),
}


@pytest.fixture(params=[(2**27, 2**22), (2 * V, V), (1, 1)], ids=["whole", "two rows", "row by row"])
def sizes(request, monkeypatch) -> None:
    for name, size in zip(("BLOCK", "PIECE"), request.param, strict=True):
        monkeypatch.setattr(module, name, size)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, H, dtype=torch.float64, generator=generator).to(dtype) for rows in (N, V))
    return hidden.requires_grad_(), weight.requires_grad_()


def slow(hidden: Tensor, weight: Tensor, case: SampledFrom) -> tuple[Tensor, Tensor]:
    """One token after the other, in float64, by the definitions."""
    logprobs, entropies = [], []
    for n in range(N):
        z = [(hidden[n].double() * weight[v].double()).sum() / case.temperature for v in range(V)]
        allowed = [v for v in range(V) if case.where is None or not case.where[n] or v not in case.forbidden]
        total = sum(z[v].exp() for v in allowed)
        logprobs.append((z[int(TOKENS[n])].exp() / total).log())
        entropies.append(-sum(z[v].exp() / total * (z[v].exp() / total).log() for v in allowed))
    return torch.stack(logprobs), torch.stack(entropies)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_those_of_the_definition(sizes, case):
    hidden, weight = inputs()
    got, expected = linear_logprobs(hidden, weight, TOKENS, case, with_entropy=True), slow(hidden, weight, case)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    for shares in ((1.0, 0.0), (0.0, 1.0), (0.5, -2.0)):
        weights = torch.linspace(-1, 2, N, dtype=torch.float64)
        sums = [shares[0] * (a * weights).sum() + shares[1] * (b * weights**2).sum() for a, b in (got, expected)]
        mine, theirs = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for total in sums)
        torch.testing.assert_close(mine, theirs)


def test_without_entropy(sizes):
    hidden, weight = inputs()
    got = linear_logprobs(hidden, weight, TOKENS)
    expected, _ = slow(hidden, weight, SampledFrom())
    torch.testing.assert_close(got.logprobs, expected)
    assert got.entropy.tolist() == [0] * N
    grads = [torch.autograd.grad(x.square().sum(), (hidden, weight)) for x in (got.logprobs, expected)]
    torch.testing.assert_close(*grads)


def test_bfloat16_is_as_near_as_its_rounding(sizes):
    hidden, weight = inputs(torch.bfloat16)
    got = linear_logprobs(hidden, weight, TOKENS)
    assert got.logprobs.dtype == torch.float32
    expected, _ = slow(hidden, weight, SampledFrom())
    torch.testing.assert_close(got.logprobs.double(), expected, rtol=0.02, atol=0.02)
    (got.logprobs.sum() - expected.detach().sum()).backward()
    mine = hidden.grad.double(), weight.grad.double()
    theirs = torch.autograd.grad(expected.sum(), (hidden, weight))
    assert mine[0].dtype == torch.float64
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b.double()).norm() < 0.02 * b.double().norm()


def test_only_what_is_trained_gets_a_gradient():
    hidden, weight = inputs()
    linear_logprobs(hidden, weight.detach(), TOKENS).logprobs.sum().backward()
    alone = hidden.grad.clone()
    hidden.grad = None
    linear_logprobs(hidden, weight, TOKENS).logprobs.sum().backward()
    torch.testing.assert_close(hidden.grad, alone)
    linear_logprobs(hidden.detach(), weight, TOKENS).logprobs.sum().backward()
    torch.testing.assert_close(weight.grad, 2 * torch.autograd.grad(slow(*inputs_of(weight))[0].sum(), weight)[0])


def inputs_of(weight: Tensor) -> tuple[Tensor, Tensor, SampledFrom]:
    return inputs()[0].detach(), weight, SampledFrom()


def test_autocast_multiplies_as_linear_does():
    hidden, weight = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logprobs(hidden, weight, TOKENS).logprobs
        logits = torch.nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(got, logits.float().log_softmax(-1).gather(1, TOKENS[:, None])[:, 0])
    got.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_huge_logits_stay_finite():
    hidden, weight = torch.tensor([[1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    got = linear_logprobs(hidden, weight, torch.tensor([1]), with_entropy=True)
    assert got.logprobs.item() == -2e4
    assert got.entropy.item() == 0
    sum(x.sum() for x in got).backward()
    assert hidden.grad.item() == -2  # ∂/∂h of −h − h


def test_bad_input():
    hidden, weight = inputs()
    with pytest.raises(ValueError, match="`temperature` must be positive, but is 0"):
        linear_logprobs(hidden, weight, TOKENS, SampledFrom(0.0))
    with pytest.raises(ValueError, match=r"`tokens` \(N,\), but have \(7, 5\) and \(6,\)"):
        linear_logprobs(hidden, weight, TOKENS[:6])
    for forbidden in ((3, V), (-1,)):
        with pytest.raises(ValueError, match="`forbidden` must lie between 0 and 10, but has"):
            linear_logprobs(hidden, weight, TOKENS, SampledFrom(1.0, forbidden, EARLY))
        with pytest.raises(ValueError, match="`forbidden` must lie between 0 and 10, but has"):
            SampledFrom(1.0, forbidden, EARLY).constrain(hidden @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_logits_are_a_tensor_of_their_own(dtype):
    logits = torch.arange(8.0, dtype=dtype).view(2, 4)
    sampled_from = SampledFrom(0.5, (1, 3), torch.tensor([True, False, True]))
    scaled = sampled_from.scaled(logits, slice(1, 3))  # rows 1 and 2 of three
    assert scaled.dtype == torch.float32
    assert scaled.tolist() == [[0, 2, 4, 6], [8, -torch.inf, 12, -torch.inf]]
    assert logits.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert SampledFrom().scaled(logits, slice(0, 2)).data_ptr() != logits.data_ptr()


def test_a_gpu_takes_a_block_at_once():
    logits = torch.empty(100, module.PIECE // 10, device="meta")
    block = slice(5, 105)
    assert list(module._pieces(block, logits)) == [(slice(0, 100), block)]
    on_cpu = torch.empty(30, module.PIECE // 10)
    assert [piece.stop - piece.start for piece, _ in module._pieces(slice(0, 30), on_cpu)] == [10, 10, 10]
