"""`bf16-true`: the backbone in half precision, and nothing else; mixed precision leaves all weights in float32."""

import pytest
import torch
from conftest import make_tokenizer

from lightning_rlhf.datamodules import RatingDataModule
from lightning_rlhf.modules import RewardModule

RATED = [{"text": chr(1 + i % 7) * (1 + i), "ratings": [3.61 + i / 100]} for i in range(4)]


def dtypes(module):
    return {name: p.dtype for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"lora_r": 2}, {"value_model": "reward"}], ids=str)
def test_bf16_true_is_dtype_bfloat16(ppo, fit, reward_folder, options):
    options = {key: reward_folder if value == "reward" else value for key, value in options.items()}
    true = fit(ppo(**options), precision="bf16-true")
    torch.manual_seed(0)  # of the adapters
    plain = fit(ppo(**options, dtype="bfloat16"))
    assert dtypes(true) == dtypes(plain)
    assert torch.bfloat16 in {p.dtype for p in true.policy.parameters()}
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in true.state_dict().items())
    assert true.samples == plain.samples
    for name, value in plain.trainer.callback_metrics.items():
        if not name.startswith(("time/", "throughput/")):
            torch.testing.assert_close(true.trainer.callback_metrics[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"lora_r": 2}], ids=str)
def test_bf16_true_starts_at_its_reference(ppo, fit, options):
    module = fit(ppo(**options, learning_rate=0.0), precision="bf16-true")
    metrics = module.trainer.callback_metrics
    assert metrics["rollout/kl"].abs() < 1e-6
    assert (metrics["policy/ratio"] - 1).abs() < 0.02  # the same bfloat16 forward, in minibatches
    assert module.value.weight.dtype == torch.float32
    assert module.policy.get_base_model().model.rotary_emb.inv_freq.dtype == torch.float32 if options else True


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Metric `SpearmanCorrcoef`")
def test_ratings_keep_their_digits_in_bf16_true(make_trainer, reward_folder):
    """3.61, 3.62, 3.63 and 3.64 are two numbers in bfloat16: pairs would be ties."""
    seen = []

    class Seen(RewardModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch["ratings"].flatten())
            return super().training_step(batch, batch_idx)

    from datasets import Dataset

    module = Seen(reward_folder)
    data = RatingDataModule(Dataset.from_list(RATED), tokenizer=make_tokenizer(), batch_size=4)
    make_trainer(max_epochs=1, precision="bf16-true", log_every_n_steps=1, limit_val_batches=0).fit(module, data)
    torch.testing.assert_close(seen[0].sort().values, torch.tensor([3.61, 3.62, 3.63, 3.64]))


def test_bf16_mixed_keeps_float32_weights_and_moves_them_about_as_far(ppo, fit):
    plain, mixed = fit(ppo()), fit(ppo(), precision="bf16-mixed")
    assert set(dtypes(mixed).values()) == {torch.float32}
    assert not torch.equal(mixed.value.weight, plain.value.weight)
    torch.testing.assert_close(mixed.value.weight, plain.value.weight, rtol=0, atol=0.02)


def test_log_probabilities_under_autocast_are_float32(ppo, fit):
    e = fit(ppo(), precision="bf16-mixed")._experience.experience
    assert e.logprobs.dtype == e.advantages.dtype == e.values.dtype == torch.float32
    assert not torch.equal(e.logprobs, e.logprobs.bfloat16().float())
