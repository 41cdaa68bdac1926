"""The frozen reference: a copy, the adapter switched off, another network; and one that follows the policy."""

import lightning as L
import pytest
import torch
from conftest import make_llama

from lightning_rlhf.callbacks.controllers import ReferenceRefresh
from lightning_rlhf.modules import GRPOModule
from lightning_rlhf.modules.backbone import add_lora
from lightning_rlhf.modules.reference import FrozenReference
from lightning_rlhf.modules.scorer import merged

IDS = torch.tensor([[1, 2, 3, 4, 5]])


def adapted():
    """A LoRA model whose adapters do something."""
    model = add_lora(make_llama(vocab_size=8), r=4, alpha=8, target_modules="all-linear")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_the_reference_stays_where_the_policy_was():
    model = make_llama(vocab_size=8)
    before = logits(model)
    reference = FrozenReference(model)
    model.lm_head.weight.data.mul_(2)
    with reference() as frozen:
        assert torch.equal(logits(frozen), before)
        assert not any(p.requires_grad for p in frozen.parameters())
        assert not frozen.training
    assert not torch.allclose(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_the_reference_of_a_lora_policy_is_the_policy_without_its_adapter():
    model = adapted()
    on = logits(model)
    with FrozenReference(model)() as frozen:
        assert frozen is model
        torch.testing.assert_close(logits(frozen), logits(make_llama(vocab_size=8)))
    assert torch.equal(logits(model), on)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_an_error_in_the_reference_leaves_the_adapter_on():
    model = adapted()
    on = logits(model)
    with pytest.raises(RuntimeError), FrozenReference(model)():
        raise RuntimeError
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("make", [lambda: make_llama(vocab_size=8), adapted], ids=["full", "lora"])
def test_another_network_can_be_the_reference(make):
    other = make_llama(seed=4, vocab_size=8)
    with FrozenReference(make(), other)() as frozen:
        assert frozen is other
        torch.testing.assert_close(logits(frozen), logits(make_llama(seed=4, vocab_size=8)))
        assert not any(p.requires_grad for p in frozen.parameters())


# --- a reference that follows the policy ---------------------------------------------------------------------------


def shifted(by):
    """A network and its reference, the network's weights `by` above the reference's."""
    model = make_llama(vocab_size=8)
    reference = FrozenReference(model)
    with torch.no_grad():
        for p in model.parameters():
            p += by
    return model, reference


def distances(model, reference):
    """Every difference that there is between the weights of the two, rounded."""
    pairs = zip(model.parameters(), reference.copy.parameters(), strict=True)
    return {round(float(x), 4) for ours, theirs in pairs for x in (ours - theirs).detach().flatten()}


@pytest.mark.parametrize(("weight", "left"), [(1.0, {0.0}), (0.25, {0.75}), (0.5, {0.5})])
def test_a_refresh_goes_a_share_of_the_way(weight, left):
    model, reference = shifted(1.0)
    storage = [p.data_ptr() for p in reference.copy.parameters()]
    reference.refresh(weight)
    assert distances(model, reference) == left
    assert [p.data_ptr() for p in reference.copy.parameters()] == storage
    assert not any(p.requires_grad for p in reference.copy.parameters())


def test_soft_refreshes_add_up():
    model, reference = shifted(1.0)
    for _ in range(3):
        reference.refresh(0.5)
    assert distances(model, reference) == {0.125}
    assert reference.refreshes == 3


def test_a_refreshed_reference_stays_where_the_policy_was():
    model, reference = shifted(0.1)
    reference.refresh()
    then = logits(model)
    model.lm_head.weight.data.mul_(2)
    with reference() as frozen:
        assert torch.equal(logits(frozen), then)
    assert not torch.allclose(logits(model), then)


def test_with_lora_the_refreshed_reference_is_a_second_adapter():
    model = adapted()
    reference, then = FrozenReference(model), logits(model)
    drawn = torch.get_rng_state()
    reference.refresh()
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name and ".default." in name)
        p.data.mul_(1.5 if p.requires_grad else 1.0)
    with reference() as frozen:
        assert torch.equal(logits(frozen), then)
    assert not torch.allclose(logits(model), then)
    assert all(p.requires_grad == ("lora_" in n and ".default." in n) for n, p in model.named_parameters())
    reference.refresh()
    with reference() as frozen:
        assert torch.equal(logits(frozen), logits(model))


def test_a_second_adapter_is_no_part_of_what_is_exported():
    model = adapted()
    expected = logits(merged(model))
    FrozenReference(model).refresh()
    plain = merged(model)
    assert not any("lora_" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(logits(plain), expected)


def test_with_lora_a_separate_reference_is_let_go():
    model, other = adapted(), make_llama(seed=4, vocab_size=8)
    reference = FrozenReference(model, other)
    reference.refresh()
    assert reference.copy is None
    with reference() as frozen:
        assert torch.equal(logits(frozen), logits(model))


@pytest.mark.parametrize("make", [lambda: make_llama(vocab_size=8), adapted], ids=["full", "lora"])
def test_the_state_brings_a_refreshed_reference_back(make):
    model = make()
    reference = FrozenReference(model)
    assert reference.state() == {}
    model.get_parameter(next(n for n, p in model.named_parameters() if p.requires_grad)).data.add_(0.3)
    reference.refresh()
    with reference() as frozen:
        expected = logits(frozen)
    state = {name: tensor.clone() for name, tensor in reference.state().items()}
    again = FrozenReference(make())
    again.load_state(state, reference.refreshes)
    assert again.refreshes == 1
    with again() as frozen:
        assert torch.equal(logits(frozen), expected)


@pytest.mark.parametrize("weight", [0.0, -0.1, 1.1])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match="`weight` must be above 0 and at most 1, but got"):
        shifted(0.1)[1].refresh(weight)


def test_lora_takes_no_soft_refresh():
    with pytest.raises(ValueError, match="`weight` must be 1 with LoRA"):
        FrozenReference(adapted()).check(0.5)


def test_a_reference_of_another_architecture_cannot_be_refreshed():
    reference = FrozenReference(make_llama(vocab_size=8), make_llama(vocab_size=8, hidden_size=16))
    with pytest.raises(ValueError, match="must have the policy's architecture"):
        reference.check(1.0)


def test_a_state_of_another_network_is_refused():
    reference = FrozenReference(make_llama(vocab_size=8))
    with pytest.raises(ValueError, match="it is that of another `model`"):
        reference.load_state({"weight": torch.zeros(1)}, 1)


# --- in a run --------------------------------------------------------------------------------------------------------


class Seen(L.Callback):
    """What every iteration logged."""

    def __init__(self):
        self.kl = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.kl.append(float(trainer.callback_metrics["rollout/kl"]))


FULL_OR_LORA = pytest.mark.parametrize("options", [{}, {"lora_r": 2}], ids=["full", "lora"])


@FULL_OR_LORA
def test_rollouts_are_measured_from_the_refreshed_reference(short, fit, options):
    plain, refreshed = Seen(), Seen()
    fit(short(GRPOModule, group_size=2)(**options), max_epochs=5, callbacks=[plain])
    fit(short(GRPOModule, group_size=2)(**options), max_epochs=5, callbacks=[ReferenceRefresh(2), refreshed])
    is_zero = [abs(kl) < 1e-5 for kl in refreshed.kl]
    assert is_zero == [True, False, True, False, True]  # before the iterations 2 and 4 the reference is the policy
    assert [abs(kl) < 1e-5 for kl in plain.kl] == [True, False, False, False, False]


def test_a_soft_refresh_leaves_part_of_the_kl(short, fit):
    ends = []
    for weight in (0.5, 1.0):
        seen = Seen()
        fit(short(GRPOModule, group_size=2)(), max_epochs=2, callbacks=[ReferenceRefresh(1, weight), seen])
        ends.append(abs(seen.kl[-1]))
    assert ends[0] > 1e-3
    assert ends[1] < 1e-5


def test_a_refresh_that_is_never_due_changes_nothing(short, fit):
    bare = fit(short(GRPOModule, group_size=2)(lora_r=2), max_epochs=2)
    torch.manual_seed(0)  # adapters are drawn
    watched = fit(short(GRPOModule, group_size=2)(lora_r=2), max_epochs=2, callbacks=[ReferenceRefresh(9)])
    assert bare.state_dict().keys() == watched.state_dict().keys()
    assert all(torch.equal(value, watched.state_dict()[name]) for name, value in bare.state_dict().items())


class SaveAt(L.Callback):
    """A checkpoint behind an optimizer step."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


# 3 steps an iteration: within the one after the refresh, behind the last batch before it, and behind that after it.
@pytest.mark.parametrize("step", [4, 3, 6])
@FULL_OR_LORA
def test_a_resumed_run_has_the_refreshed_reference(short, fit, options, step, tmp_path):
    make = short(GRPOModule, group_size=2)
    path, seen, again = tmp_path / "at.ckpt", Seen(), Seen()
    whole = fit(make(**options), max_epochs=4, callbacks=[SaveAt(step, path), ReferenceRefresh(1), seen])
    resumed = fit(make(**options), ckpt_path=path, max_epochs=4, callbacks=[ReferenceRefresh(1), again])
    assert resumed.reference.refreshes == whole.reference.refreshes == 3
    assert again.kl[-2:] == seen.kl[-2:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with whole.reference() as ours, resumed.reference() as theirs:
        assert torch.equal(logits(ours), logits(theirs))


def test_a_checkpoint_holds_the_reference_only_once_it_was_refreshed(short, fit, tmp_path):
    path = tmp_path / "at.ckpt"
    for step, tensors in ((3, False), (6, True)):
        fit(short(GRPOModule, group_size=2)(), max_epochs=2, callbacks=[SaveAt(step, path), ReferenceRefresh(1)])
        assert bool(torch.load(path, weights_only=True)["refreshed_reference"]["tensors"]) == tensors


def test_a_run_without_its_refresh_is_warned_when_resumed(short, fit, tmp_path):
    path = tmp_path / "at.ckpt"
    fit(short(GRPOModule, group_size=2)(), max_epochs=2, callbacks=[SaveAt(6, path), ReferenceRefresh(1)])
    with pytest.warns(UserWarning, match="ReferenceRefresh"):
        fit(short(GRPOModule, group_size=2)(), ckpt_path=path, max_epochs=2)
