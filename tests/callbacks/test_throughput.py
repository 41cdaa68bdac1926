from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_rlhf.callbacks import Throughput, throughput
from lightning_rlhf.callbacks.throughput import flops_per_token, tokens_in


class Reader(L.LightningModule):
    """Reads batches of tokens; one of its two layers is frozen."""

    def __init__(self):
        super().__init__()
        self.frozen, self.trained = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 5, bias=False)
        self.frozen.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return self.trained(self.frozen(torch.ones(2))).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.trained.parameters(), lr=0.1)


MASKS = [torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[0, 1]])]  # 6 tokens


def read(tmp_path, **options):
    trainer = L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False, accelerator="cpu",
        enable_progress_bar=False, default_root_dir=tmp_path, callbacks=[Throughput()], **options,
    )  # fmt: skip
    trainer.fit(Reader(), DataLoader([{"attention_mask": mask} for mask in MASKS], batch_size=None))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def test_padding_is_no_token():
    of_rl = SimpleNamespace(
        prompt_mask=torch.tensor([[False, True]]), response_mask=torch.tensor([[True, True, False]])
    )
    assert int(tokens_in(of_rl)) == 3
    assert int(tokens_in({"attention_mask": MASKS[0], "loss_mask": MASKS[0]})) == 5
    assert tokens_in([1, 2]) == 0


def test_frozen_weights_need_no_gradient_of_their_own():
    assert flops_per_token(Reader()) == 4 * (6 + 15) + 2 * 15


def test_tokens_per_second_from_the_first_batch_to_the_last(tmp_path, monkeypatch):
    clock = iter([10.0, 11.0, 14.0])  # first batch begins, ends, second ends
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    assert read(tmp_path)["throughput/trained_tokens_per_second"] == pytest.approx(6 / 4)


def test_utilisation_where_the_peak_is_known(tmp_path, monkeypatch):
    assert "throughput/mfu" not in read(tmp_path)  # of a CPU nobody knows it
    asked = []
    monkeypatch.setattr(throughput, "get_available_flops", lambda device, dtype: asked.append(dtype) or 1000)
    ticks = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(ticks))
    assert read(tmp_path)["throughput/mfu"] == pytest.approx(6 * 114 / 2 / 1000)
    ticks = iter([0.0, 1.0, 2.0])
    read(tmp_path, precision="bf16-mixed")
    assert asked == [torch.float32, torch.bfloat16]


def test_memory_is_the_process_s(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "peak_memory_gib", lambda: 2.5)
    assert read(tmp_path)["memory/peak_gib"] == 2.5
    monkeypatch.setattr(throughput, "peak_memory_gib", lambda: None)  # a system that does not tell
    assert "memory/peak_gib" not in read(tmp_path)
