"""Cached log-probs of the reference: the same run, nothing computed twice, nothing stale, nothing kept in memory.

python test_reference_cache.py FOLDER     as one of two ranks: what `two_ranks` below needs
"""

import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_llama, make_tokenizer
from processes import ranks, run_together
from torch.utils.data import DataLoader

from lightning_rlhf.callbacks import RNGState
from lightning_rlhf.checkpointing import AtomicCheckpointIO
from lightning_rlhf.datamodules import PreferenceDataModule
from lightning_rlhf.modules import completions
from lightning_rlhf.modules.backbone import add_lora
from lightning_rlhf.modules.preference import PreferenceModule
from lightning_rlhf.modules.reference_cache import ReferenceCache, fingerprint, row_keys
from lightning_rlhf.modules.sharding import whole_state

TEXTS = ("\1\2\3\4\5\6\7\1\2", "\2", "\3\3\3", "\4\1", "\5\6\7\1", "\6\6", "\7\1\2\3", "\1\1", "\2\4\6", "\3\5")
ROWS = [{"prompt": "\1", "chosen": a, "rejected": b} for a, b in zip(TEXTS, reversed(TEXTS), strict=True)]
HELD_OUT = [{"prompt": "\4", "chosen": a, "rejected": b} for a, b in zip(TEXTS[:3], TEXTS[3:6], strict=True)]
SETTINGS = dict(learning_rate=0.1, adam_eps=0.1, lr_scheduler="linear")
LOGPROBS = completions.completion_logprobs


class SaveAt(L.Callback):
    """Write a checkpoint behind an optimizer step."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def train(
    folder,
    rows=ROWS,
    held_out=HELD_OUT,
    batch_size=4,
    model="policy",
    ckpt_path=None,
    save=None,
    trainer=None,
    **options,
):
    """Three epochs; the module afterwards."""
    L.seed_everything(3, verbose=False)
    module = PreferenceModule(str(folder / model), **(SETTINGS | options))
    data, val_data = Dataset.from_list(rows), held_out and Dataset.from_list(held_out)
    data = PreferenceDataModule(data, val_data=val_data, batch_size=batch_size, val_batch_size=2, group_by_length=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [RNGState(), *([SaveAt(*save)] if save else [])]
    L.Trainer(
        **quiet | dict(max_epochs=3, accelerator="cpu", devices=1) | (trainer or {}),
        plugins=[AtomicCheckpointIO()],
        callbacks=callbacks,
    ).fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


def state(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_same(found, expected, **tolerance):
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, **tolerance)


def of(cache: Path) -> list[Path]:
    return sorted(cache.glob("*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two language models of eight tokens."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


def make_models(folder):
    for seed, name in enumerate(("policy", "other")):
        make_llama(seed=seed, vocab_size=8).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)


class Counting:
    """`completion_logprobs`, with a count of the completions that were asked about without gradient."""

    rows = 0

    def __call__(self, network, batch):
        if not torch.is_grad_enabled():
            self.rows += len(batch["input_ids"])
        return LOGPROBS(network, batch)


@pytest.fixture
def asked(monkeypatch):
    """How many completions the reference is asked about."""
    counting = Counting()
    monkeypatch.setattr(completions, "completion_logprobs", counting)
    return counting


pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers")]
KINDS = {"full": {}, "lora": {"lora_r": 4}, "other": {"reference": "other"}}


def options_of(kind, folder):
    return {k: str(folder / v) if k == "reference" else v for k, v in KINDS[kind].items()}


# --- the same run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_the_cache_is_that_without(kind, folder, tmp_path):
    options = options_of(kind, folder)
    without = train(folder, **options)
    cached = train(folder, reference_cache=str(tmp_path / "cache"), **options)
    again = train(folder, reference_cache=str(tmp_path / "cache"), **options)
    assert_same(state(cached), state(without), rtol=1e-5, atol=1e-6)
    assert_same(state(again), state(cached), rtol=0, atol=0)
    metrics = [module.trainer.callback_metrics for module in (without, cached)]
    for name in metrics[1]:
        torch.testing.assert_close(metrics[1][name], metrics[0][name], rtol=1e-4, atol=1e-5)
    assert metrics[0].keys() - metrics[1].keys() == {"val/kl_per_token"}  # there is no network to ask
    assert (state(without)["policy.lm_head.weight" if kind == "full" else next(iter(state(without)))]).isfinite().all()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_in_its_first_epoch_to_the_last_digits(precision, folder, tmp_path):
    """Rounding depends on which completions are in a batch: only there may the two differ."""
    trainer = dict(max_epochs=1, precision=precision)
    without = train(folder, trainer=trainer)
    assert_same(state(train(folder, trainer=trainer, reference_cache=str(tmp_path))), state(without), rtol=0, atol=1e-6)


def test_the_reference_is_let_go_of(folder, tmp_path):
    module = train(folder, reference_cache=str(tmp_path))
    assert module.reference is None
    assert train(folder).reference.copy is not None


def test_a_resumed_run_with_an_empty_cache_has_its_first_reference(folder, tmp_path):
    """And goes on within the epoch, on the batch where it stood."""
    whole = train(folder, reference_cache=str(tmp_path / "a"), save=(4, str(tmp_path / "a.ckpt")))
    resumed = train(folder, reference_cache=str(tmp_path / "b"), ckpt_path=str(tmp_path / "a.ckpt"))
    assert resumed.trainer.global_step == whole.trainer.global_step == 9
    assert_same(state(resumed), state(whole), rtol=0, atol=0)
    first, second = (torch.load(next(iter(of(tmp_path / name))), weights_only=True) for name in "ab")
    assert torch.equal(first["values"], second["values"])


@pytest.mark.parametrize("options", [{"trainer": {"limit_val_batches": 0}}, {"held_out": None}], ids=str)
def test_runs_bounded_by_steps_and_runs_without_validation(options, folder, tmp_path):
    trainer = dict(max_steps=2, max_epochs=-1) | options.get("trainer", {})
    without = train(folder, **options | {"trainer": trainer})
    cached = train(folder, **options | {"trainer": trainer}, reference_cache=str(tmp_path))
    assert_same(state(cached), state(without), rtol=1e-5, atol=1e-6)


# --- nothing twice, nothing stale ---------------------------------------------------------------------------------


def distinct(rows):
    return len({(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")})


def test_each_completion_is_computed_once_and_a_second_run_computes_none(folder, tmp_path, asked):
    train(folder, reference_cache=str(tmp_path))
    assert asked.rows == 2 * (len(ROWS) + len(HELD_OUT))
    (path,) = of(tmp_path)
    saved = torch.load(path, weights_only=True)
    assert saved["keys"].shape == (distinct(ROWS) + distinct(HELD_OUT), 16)
    assert (saved["keys"].dtype, saved["values"].dtype) == (torch.uint8, torch.float32)
    asked.rows = 0
    before = path.read_bytes()
    train(folder, reference_cache=str(tmp_path))
    assert asked.rows == 0
    assert path.read_bytes() == before


def test_values_are_those_of_the_reference(folder, tmp_path):
    module = train(folder, reference_cache=str(tmp_path))
    batch = module.trainer.train_dataloader.collate_fn(ROWS)
    with torch.no_grad():
        expected = LOGPROBS(make_llama(vocab_size=8), batch).logprobs
    torch.testing.assert_close(module.reference_logprobs(batch), expected)


def test_a_changed_row_is_computed_and_added(folder, tmp_path, asked):
    train(folder, reference_cache=str(tmp_path))
    asked.rows = 0
    rows = [*ROWS[:-1], ROWS[-1] | {"chosen": "\7\7\7"}]
    cached = train(folder, rows=rows, reference_cache=str(tmp_path))
    assert 0 < asked.rows < 2 * len(ROWS)
    (path,) = of(tmp_path)
    assert len(torch.load(path, weights_only=True)["keys"]) == distinct(ROWS) + distinct(HELD_OUT) + 1
    assert_same(state(cached), state(train(folder, rows=rows)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"dtype": "bfloat16"}, {"trainer": {"precision": "bf16-mixed"}}], ids=str
)
def test_another_network_or_precision_has_a_file_of_its_own(change, folder, tmp_path, asked):
    train(folder, reference_cache=str(tmp_path))
    asked.rows = 0
    train(folder, reference_cache=str(tmp_path), **change)
    assert asked.rows == 2 * (len(ROWS) + len(HELD_OUT))
    assert len(of(tmp_path)) == 2


def test_adapter_off_and_a_frozen_copy_share_a_file(folder, tmp_path, asked):
    train(folder, reference_cache=str(tmp_path))
    asked.rows = 0
    train(folder, reference_cache=str(tmp_path), lora_r=4)
    assert asked.rows == 0
    assert len(of(tmp_path)) == 1


class TestFingerprint:
    def test_adapters_are_no_part_of_it_whatever_they_hold(self):
        model = make_llama(vocab_size=8)
        plain = fingerprint(model, "32-true")
        adapted = add_lora(model, r=2, alpha=4, target_modules="all-linear")
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p)
        assert fingerprint(adapted, "32-true") == plain

    def test_any_change_of_the_network_changes_it(self):
        found = {fingerprint(make_llama(vocab_size=8), "32-true")}
        found.add(fingerprint(make_llama(vocab_size=8), "bf16-mixed"))
        found.add(fingerprint(make_llama(vocab_size=8).bfloat16(), "32-true"))
        found.add(fingerprint(make_llama(vocab_size=8, rms_norm_eps=1e-3), "32-true"))
        changed = make_llama(vocab_size=8)
        changed.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-6
        found.add(fingerprint(changed, "32-true"))
        assert len(found) == 5

    def test_where_it_came_from_does_not(self, folder):
        names = []
        for name in ("policy", str(folder / "policy")):
            model = make_llama(vocab_size=8)
            model.config._name_or_path = name
            names.append(fingerprint(model, "32-true"))
        assert names[0] == names[1]


class TestKeys:
    BATCH = {  # noqa: RUF012
        "input_ids": torch.tensor([[1, 2, 3], [1, 2, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "loss_mask": torch.tensor([[False, True, True], [False, True, False]]),
    }

    def test_padding_is_no_part_of_them(self):
        wider = {name: torch.cat([x, torch.zeros_like(x[:, :1])], 1) for name, x in self.BATCH.items()}
        wider["input_ids"][:, -1] = 7
        assert row_keys(wider) == row_keys(self.BATCH)

    @pytest.mark.parametrize("name", BATCH)
    def test_any_change_of_a_row_changes_its_key(self, name):
        changed = {key: x.clone() for key, x in self.BATCH.items()}
        changed[name][0, 1] = {"input_ids": 5, "attention_mask": 0, "loss_mask": False}[name]
        before, after = row_keys(self.BATCH), row_keys(changed)
        assert before[0] != after[0]
        assert before[1] == after[1]
        assert before[0] != before[1]


# --- what cannot work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["truncated", "garbage", "empty", "other"])
def test_a_file_that_is_broken_is_named(content, folder, tmp_path):
    train(folder, reference_cache=str(tmp_path))
    (path,) = of(tmp_path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"\1" * 99, "empty": b""}.get(content, b""))
    if content == "other":
        torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=rf"`reference_cache`: `{path}` is not a whole cache file .* Delete it"):
        train(folder, reference_cache=str(tmp_path))


def test_nothing_half_written_is_left_behind(tmp_path, monkeypatch):
    cache = ReferenceCache(tmp_path / "a.pt")
    cache.values = {b"0" * 16: -1.5}
    cache.write()
    cache.values[b"1" * 16] = -2.5
    save = torch.save

    def fails(content, file):
        save(content, file)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        cache.write()
    assert [path.name for path in of(tmp_path)] == ["a.pt"]
    found = ReferenceCache(tmp_path / "a.pt")
    found.read()
    assert found.values == {b"0" * 16: -1.5}


def test_other_data_than_that_of_the_fit(folder, tmp_path):
    module = train(folder, reference_cache=str(tmp_path))
    rows = [{"prompt": "\5", "chosen": "\5\5", "rejected": "\6"}]
    data = PreferenceDataModule(Dataset.from_list(rows), test_data=Dataset.from_list(rows))
    message = "`reference_cache` holds the completions .*, but 2 of 2 in this batch are others"
    with pytest.raises(ValueError, match=message):
        module.trainer.test(module, data)


def test_evaluation_in_a_run_of_its_own_asks_the_reference(folder, tmp_path, make_trainer):
    module = PreferenceModule(str(folder / "policy"), reference_cache=str(tmp_path))
    data = PreferenceDataModule(Dataset.from_list(ROWS), val_data=Dataset.from_list(HELD_OUT))
    metrics = make_trainer().validate(module, data, verbose=False)[0]
    assert metrics["val/kl_per_token"] == pytest.approx(0, abs=1e-6)
    assert of(tmp_path) == []


def test_loaders_of_others(folder, tmp_path, make_trainer):
    batch = {name: torch.zeros(2, 3, dtype=torch.long) for name in ("input_ids", "attention_mask", "loss_mask")}
    module = PreferenceModule(str(folder / "policy"), reference_cache=str(tmp_path))
    with pytest.raises(ValueError, match=r"`reference_cache` needs the loaders of .* got a DataLoader"):
        make_trainer(max_epochs=1).fit(module, DataLoader([batch | {"margin": torch.zeros(1)}], batch_size=None))


# --- several ranks ------------------------------------------------------------------------------------------------

RUNS = {"full ddp": {}, "full fsdp2": {}, "lora fsdp2": {"lora_r": 2}}


def as_a_rank(folder: Path) -> None:
    """Every run from an empty cache and from a full one."""
    results = {}
    for name, options in RUNS.items():
        for start in ("empty", "full"):
            asked = completions.completion_logprobs = Counting()
            trainer = dict(devices=2, strategy=name.split()[1])
            module = train(folder, batch_size=2, trainer=trainer, reference_cache=str(folder / name), **options)
            results[f"{name} {start}"] = whole_state(module), asked.rows
    torch.save(results, folder / f"rank.{torch.distributed.get_rank()}")


@pytest.fixture(scope="module")
def two_ranks(folder) -> list[dict]:
    commands, environments = zip(*ranks([sys.executable, __file__, str(folder)]), strict=True)
    run_together(*commands, log_folder=folder / "logs", environments=environments)
    return [torch.load(folder / f"rank.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_share_the_work_and_end_where_one_process_does(name, two_ranks, folder):
    expected = whole_state(train(folder, **RUNS[name]))
    for start in ("empty", "full"):
        assert_same(two_ranks[0][f"{name} {start}"][0], expected, rtol=1e-4, atol=3e-5)
    asked = {start: [rank[f"{name} {start}"][1] for rank in two_ranks] for start in ("empty", "full")}
    assert asked["full"] == [0, 0]
    assert sum(asked["empty"]) == 2 * (len(ROWS) + len(HELD_OUT))
    assert max(asked["empty"]) < sum(asked["empty"])
    (path,) = of(folder / name)
    (another,) = of(folder / "full ddp")
    assert path.name == another.name  # sharded or not, with or without an adapter


if __name__ == "__main__":
    as_a_rank(Path(sys.argv[1]))
