"""Which rows come when: on any number of processes, in any epoch, after a stop, and under a real Trainer."""

import math
import random
from itertools import chain

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from lightning_rlhf.loaders import WINDOW, EvenBatches, ResumableLoader, Rows, generator_for

SIZES = [(n, world, size) for world in (1, 2, 3, 4) for n in range(world, 41) for size in (1, 2, 3, 4, 5)]
ignore_lightning = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*will create 2 worker processes",
    "ignore:.*when using `ckpt_path`, callbacks used to create the checkpoint",
)


def share_out(num_rows, world, batch_size, shuffle=True, epoch=0, **kwargs) -> list[list[list[int]]]:
    """Batches by rank."""
    samplers = [EvenBatches(num_rows, batch_size, world, rank, shuffle, **kwargs) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


def steps_of(ranks: list[list[list[int]]]) -> list[set[int]]:
    """What all ranks together have at each step."""
    return [set(chain.from_iterable(batches)) for batches in zip(*ranks, strict=True)]


def flat(batches: list) -> list:
    return list(chain.from_iterable(batches))


class TestEvenBatches:
    @pytest.mark.parametrize("kind", ["shuffled", "in order", "by length"])
    def test_every_row_once_and_as_many_batches_everywhere(self, kind):
        for n, world, size in SIZES:
            lengths = [row * 7 % 11 for row in range(n)] if kind == "by length" else None
            ranks = share_out(n, world, size, shuffle=kind != "in order", lengths=lengths)
            assert sorted(flat(flat(ranks))) == list(range(n))
            count = min(math.ceil(math.ceil(n / world) / size), n // world)
            assert [len(batches) for batches in ranks] == [count] * world
            assert len(EvenBatches(n, size, world, 0, shuffle=False)) == count
            lengths_of_batches = {len(batch) for batch in flat(ranks)}
            assert min(lengths_of_batches) >= 1
            assert max(lengths_of_batches) - min(lengths_of_batches) <= 1
            assert max(lengths_of_batches) <= (size if size > 1 or n % world == 0 else 2)

    @pytest.mark.parametrize(("world", "size"), [(1, 6), (2, 3), (1, 3), (3, 2), (1, 12)])
    def test_rows_that_stay_together(self, world, size):
        ranks = share_out(24, world, size, together=3, passes=2, seed=5)
        in_order = [row for step in zip(*ranks, strict=True) for row in flat(step)]
        groups = list(zip(*[iter(in_order)] * 3, strict=True))
        assert all((a % 3, b, c) == (0, a + 1, a + 2) for a, b, c in groups)
        first, second = groups[:8], groups[8:]
        assert sorted(first) == sorted(second) == list(zip(*[iter(range(24))] * 3, strict=True))
        assert first != second
        assert first != sorted(first)
        alone = share_out(24, 1, 6, together=3, passes=2, seed=5)
        assert in_order == flat(flat(alone))  # on any number of processes

    def test_by_hand(self):
        # 7 rows, 2 processes, at most 2 rows each: 2 steps of 3 and 4 rows, 0 1 2 | 3 4 5 6; evens go to process 0.
        assert share_out(7, 2, 2, shuffle=False) == [[[0, 2], [4, 6]], [[1], [3, 5]]]
        # 5 rows, 2 processes, 1 row each: a third step would leave process 1 without a row.
        assert share_out(5, 2, 1, shuffle=False) == [[[0], [2, 4]], [[1], [3]]]

    def test_without_shuffling_rows_are_dealt_out_one_by_one(self):
        for n, world, size in SIZES:
            for rank, batches in enumerate(share_out(n, world, size, shuffle=False)):
                assert flat(batches) == list(range(rank, n, world))

    def test_steps_are_those_of_one_process_with_as_many_rows(self):
        for n, world, size in SIZES:
            if size == 1 and n % world:  # the one case with fewer steps
                continue
            for lengths in (None, [row * 7 % 11 for row in range(n)]):
                one = steps_of(share_out(n, 1, world * size, lengths=lengths, seed=3, epoch=2))
                assert steps_of(share_out(n, world, size, lengths=lengths, seed=3, epoch=2)) == one

    def test_steps_follow_the_order_of_the_pass(self):
        n, world, size = 24, 3, 2
        order = torch.randperm(n, generator=generator_for(5, 4, 0)).tolist()  # seed, epoch, pass
        steps = steps_of(share_out(n, world, size, seed=5, epoch=4))
        assert steps == [set(order[i : i + world * size]) for i in range(0, n, world * size)]

    def test_order_depends_on_seed_and_epoch_and_pass_alone(self):
        def order(seed, epoch):
            return flat(share_out(30, 1, 4, seed=seed, epoch=epoch, passes=2)[0])

        state = torch.get_rng_state()
        found = [order(0, 0), order(0, 1), order(1, 0)]
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(99)
        assert order(0, 1) == found[1]
        passes = [tuple(rows[start : start + 30]) for rows in found for start in (0, 30)]
        assert len(set(passes)) == 6
        assert all(sorted(rows) == list(range(30)) for rows in passes)

    def test_passes(self):
        sampler = EvenBatches(7, 3, 1, 0, shuffle=True, passes=4)
        assert len(sampler) == len(list(sampler)) == 4 * 3

    def test_grouping_pads_less(self):
        draw = random.Random(0)
        lengths = [int(draw.lognormvariate(4, 1)) + 1 for _ in range(1000)]

        def padding(**kwargs):
            batches = flat(share_out(1000, 2, 8, **kwargs))
            assert sorted(flat(batches)) == list(range(1000))
            return sum(max(lengths[row] for row in batch) * len(batch) for batch in batches) - sum(lengths)

        assert padding(lengths=lengths) < 0.3 * padding()

    def test_grouping_gives_all_processes_like_lengths_at_a_step(self):
        world, size = 2, 3
        n = WINDOW * world * size  # one window: row i is the i-th longest, and so steps are blocks of 6
        steps = steps_of(share_out(n, world, size, lengths=list(range(n))))
        assert sorted(steps, key=min) == [set(range(start, start + 6)) for start in range(0, n, 6)]
        assert steps != sorted(steps, key=min)

    def test_grouping_moves_rows_within_windows_only(self):
        n = 3 * WINDOW * 4
        plain, grouped = (
            steps_of(share_out(n, 1, 4, lengths=lengths, epoch=1)) for lengths in (None, [row % 9 for row in range(n)])
        )
        assert plain != grouped
        for start in range(0, len(plain), WINDOW):
            assert set.union(*plain[start : start + WINDOW]) == set.union(*grouped[start : start + WINDOW])

    def test_fewer_rows_than_processes(self):
        with pytest.raises(ValueError, match=r"3 rows cannot be shared out over 4 processes.* at least 4 rows"):
            EvenBatches(3, 1, 4, 0, shuffle=True)


class Squares(Dataset):
    """Writes down which rows were read."""

    def __init__(self, size):
        self.size, self.read = size, []

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        self.read.append(row)
        return row**2


def make_loader(dataset=None, num_workers=0, shuffle=True, batch_size=3, cls=ResumableLoader) -> ResumableLoader:
    dataset = range(10) if dataset is None else dataset
    batches = EvenBatches(len(dataset), batch_size, 1, 0, shuffle)
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    return cls(Rows(dataset), batches, collate_fn=list, generator=torch.Generator(), **workers)


@pytest.fixture(params=[0, 2], ids=["no workers", "2 workers"])
def num_workers(request) -> int:
    return request.param


@ignore_lightning
class TestResumableLoader:
    def test_gives_the_rest_then_all(self, num_workers):
        whole = [list(make_loader())]
        other = make_loader()
        other.sampler.set_epoch(1)
        whole.append(list(other))
        for done in range(4):
            first, second = make_loader(num_workers=num_workers), make_loader(num_workers=num_workers)
            batches = iter(first)
            assert [next(batches) for _ in range(done)] == whole[0][:done]
            second.load_state_dict(first.state_dict())
            assert second.state_dict() == first.state_dict()
            assert list(second) == whole[0][done:]
            assert list(second) == whole[0]
            second.sampler.set_epoch(1)
            assert list(second) == whole[1]
            assert len(second) == 4

    def test_skipped_rows_are_not_read(self):
        dataset = Squares(10)
        loader = make_loader(dataset, shuffle=False)  # 0 1 | 2 3 4 | 5 6 | 7 8 9
        loader.load_state_dict({"batches": 2, "epoch": 0, "of": 4})
        assert list(loader) == [[25, 36], [49, 64, 81]]
        assert dataset.read == [5, 6, 7, 8, 9]

    @pytest.mark.parametrize("state", [{"batches": 4, "epoch": 0, "of": 4}, {"batches": 2, "epoch": 7, "of": 4}])
    def test_after_the_end_of_an_epoch_comes_all(self, state):
        # The second is of an epoch that `limit_train_batches` cut short: by now Lightning says 0 or 8, not 7.
        loader = make_loader()
        loader.load_state_dict(state)
        assert list(loader) == list(make_loader())

    def test_epoch_may_be_told_after_the_iterator_was_asked_for(self, num_workers):
        expected = make_loader()
        expected.sampler.set_epoch(3)
        loader = make_loader(num_workers=num_workers)
        loader.load_state_dict({"batches": 1, "epoch": 3, "of": 4})
        batches = iter(loader)
        loader.sampler.set_epoch(3)
        assert list(batches) == list(expected)[1:]

    def test_a_pass_broken_off_does_not_disturb_the_next(self, num_workers):
        loader = make_loader(num_workers=num_workers)
        for _ in range(2):
            next(iter(loader))
            assert loader.state_dict() == {"batches": 1, "epoch": 0, "of": 4}
        assert list(loader) == list(make_loader())

    def test_refuses_the_place_in_an_epoch_of_another_length(self):
        loader = make_loader(batch_size=5)
        loader.load_state_dict(make_loader().state_dict() | {"batches": 1})
        with pytest.raises(ValueError, match="within an epoch of 4 batches, but now an epoch has 2"):
            next(iter(loader))

    def test_draws_nothing_from_the_global_generator(self):
        state = torch.get_rng_state()
        list(make_loader())
        assert torch.equal(torch.get_rng_state(), state)

    def test_lightning_takes_it_for_resumable(self):
        assert isinstance(make_loader(), _Stateful)


class Batched(Squares):
    def __getitems__(self, rows):
        self.read.append(tuple(rows))
        return [row**2 for row in rows]


def test_rows():
    assert Rows(Squares(5))[[3, 1]] == [9, 1]
    batched = Batched(5)
    assert Rows(batched)[[3, 1]] == [9, 1]
    assert batched.read == [(3, 1)]
    assert len(Rows(batched)) == 5


class Probe(L.LightningModule):
    """Writes down the batches that it is fed: (stage, rows)."""

    def __init__(self, batch_size=3, num_workers=0, cls=ResumableLoader):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.loader = {"batch_size": batch_size, "num_workers": num_workers, "cls": cls}
        self.seen: list[tuple[str, list[int]]] = []

    def train_dataloader(self):
        return make_loader(**self.loader)

    def val_dataloader(self):
        return make_loader(range(5), shuffle=False, **self.loader)  # by 3: 0 1 | 2 3 4

    def predict_dataloader(self):
        return make_loader(range(5), shuffle=False, **self.loader)

    def training_step(self, batch, batch_idx):
        self.seen.append(("train", batch))
        return self.weight

    def validation_step(self, batch, batch_idx):
        self.seen.append(("val", batch))

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    @property
    def trained_on(self) -> list[list[int]]:
        return [batch for stage, batch in self.seen if stage == "train"]


def epoch_of(number: int) -> list[list[int]]:
    loader = make_loader()
    loader.sampler.set_epoch(number)
    return list(loader)


@ignore_lightning
class TestUnderATrainer:
    @pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 11}], ids=["max_epochs", "max_steps"])
    def test_goes_on_with_the_next_batch(self, limit, num_workers, make_trainer, tmp_path):
        whole = Probe()
        keep_all = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        make_trainer(enable_checkpointing=True, callbacks=[keep_all], limit_val_batches=0, **limit).fit(whole)
        batches = flat([epoch_of(number) for number in range(3)])[: 11 if "max_steps" in limit else 12]
        assert whole.trained_on == batches
        for step in range(1, len(batches)) if not num_workers else (2, 4, 7):
            rest = Probe(num_workers=num_workers)
            trainer = make_trainer(limit_val_batches=0, **limit)
            trainer.fit(rest, ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
            assert rest.trained_on == batches[step:]
            assert trainer.global_step == len(batches)

    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    def test_a_checkpoint_of_a_resumed_run_counts_on(self, make_trainer, tmp_path):
        for folder, resumed in (("first", None), ("second", "first/step=1.ckpt"), ("third", "second/step=2.ckpt")):
            module = Probe()
            keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
            trainer = make_trainer(max_epochs=1, limit_val_batches=0, enable_checkpointing=True, callbacks=[keep])
            trainer.fit(module, ckpt_path=resumed and tmp_path / resumed, weights_only=True)
        assert module.trained_on == epoch_of(0)[2:]

    def test_validates_as_the_uninterrupted_run(self, num_workers, make_trainer, tmp_path):
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)
        every_second = {"max_epochs": 2, "val_check_interval": 2}
        whole, rest = Probe(), Probe(num_workers=num_workers)
        make_trainer(enable_checkpointing=True, callbacks=[keep], **every_second | {"max_steps": 3}).fit(Probe())
        make_trainer(**every_second).fit(whole)
        make_trainer(**every_second).fit(rest, ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
        validation, one, two = [("val", [0, 1]), ("val", [2, 3, 4])], epoch_of(0), epoch_of(1)
        parts = [[("train", batch) for batch in part] for part in (one[:2], one[2:], two[:2], two[2:])]
        assert whole.seen == flat([part + validation for part in parts])
        assert rest.seen == whole.seen[2 + 2 + 1 :]  # behind 2 batches, their validation and 1 batch

    def test_a_validation_cut_short_does_not_shorten_the_next(self, num_workers, make_trainer):
        module = Probe(num_workers=num_workers)
        make_trainer(max_epochs=1, num_sanity_val_steps=1).fit(module)
        assert [batch for stage, batch in module.seen if stage == "val"] == [[0, 1], [0, 1], [2, 3, 4]]

    @pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_steps": 6}], ids=["max_epochs", "max_steps"])
    def test_an_epoch_cut_short_is_over(self, limit, make_trainer, tmp_path):
        limit = {"limit_train_batches": 3, **limit}
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)
        first, rest = Probe(), Probe()
        trainer = make_trainer(
            enable_checkpointing=True, callbacks=[keep], **limit | {"max_epochs": 1, "max_steps": -1}
        )
        trainer.fit(first)
        make_trainer(**limit).fit(rest, ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
        assert first.trained_on == epoch_of(0)[:3]
        assert rest.trained_on == epoch_of(1)[:3]

    @pytest.mark.filterwarnings("ignore:You requested to overfit")
    def test_overfit_batches_are_the_same_whole_batches_in_every_epoch(self, make_trainer):
        module = Probe()
        make_trainer(max_epochs=3, overfit_batches=1).fit(module)
        assert module.trained_on == [[0, 1]] * 3  # 10 rows in 4 batches in order: 0 1 | 2 3 4 | 5 6 | 7 8 9

    def test_predicts_each_row_once_in_order(self, num_workers, make_trainer):
        class Loader(ResumableLoader):
            pass

        class Wrapping(ResumableLoader):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)

        expected = [[0, 1], [2, 3, 4]]
        for cls in (ResumableLoader, Loader, Wrapping):
            module = Probe(num_workers=num_workers, cls=cls)
            # Lightning builds the loader anew: here from its arguments, there from its attributes.
            assert make_trainer().predict(module) == expected
            if cls is not Wrapping:  # whose arguments have no names
                assert make_trainer().predict(module, module.predict_dataloader()) == expected
