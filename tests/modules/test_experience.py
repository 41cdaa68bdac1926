"""The order of the minibatches and what they hold."""

import pytest
import torch

from lightning_rlhf.modules.experience import ExperienceDataset, experience_loader
from lightning_rlhf.modules.online_dpo import PairExperience
from lightning_rlhf.modules.ppo import PPOExperience

N = 6


def experience():
    """Row i holds the number i; its prompt has 1 + i % 3 tokens, its response i + 1."""
    rows = torch.arange(N)[:, None]
    prompt_mask = torch.arange(3).flip(0) <= rows % 3
    response_mask = torch.arange(N) <= rows
    number = rows.expand(N, N).float()
    return PPOExperience(rows.expand(N, 3), prompt_mask, rows.expand(N, N), response_mask, *[number] * 4)


def loader(batch_size=2, passes=1, seed=0, world_size=1, rank=0, epoch=0):
    dataset = ExperienceDataset(N)
    dataset.experience = experience()
    made = experience_loader(dataset, batch_size, passes, seed, world_size, rank)
    made.sampler.set_epoch(epoch)
    return made


def order(**options):
    return [i for batch in loader(**options) for i in batch.response_ids[:, 0].tolist()]


def test_each_pass_is_a_permutation_of_its_own():
    seen = order(passes=3)
    passes = [seen[k * N : (k + 1) * N] for k in range(3)]
    assert all(sorted(one) == list(range(N)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_length_is_known_before_there_is_experience():
    assert len(experience_loader(ExperienceDataset(N), 2, 4, 0, 1, 0)) == 12


def test_order_depends_on_seed_epoch_and_on_nothing_else():
    plain = order(passes=2)
    torch.manual_seed(9)
    assert order(passes=2) == plain
    others = [order(passes=2, **change) for change in ({"seed": 1}, {"epoch": 1})]
    assert len({tuple(o) for o in [plain, *others]}) == 3
    assert order(passes=3)[: 2 * N] == plain


def test_ranks_share_out_the_minibatches_of_one_process():
    def steps(**options):
        return [sorted(batch.response_ids[:, 0].tolist()) for batch in loader(passes=2, **options)]

    ranks = [steps(batch_size=1, world_size=2, rank=rank) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == steps(batch_size=2)


def test_rows_of_a_minibatch_stay_together():
    whole = experience()
    for batch in loader(passes=2):
        rows = batch.response_ids[:, 0]
        lengths = batch.response_mask.sum(1)
        assert torch.equal(lengths, rows + 1)
        assert torch.equal(batch.prompt_mask.sum(1), rows % 3 + 1)
        assert torch.equal(batch.returns[:, 0], rows.float())
        assert torch.equal(lengths, whole.response_mask[rows].sum(1))


def test_minibatches_are_trimmed_to_their_longest():
    for batch in loader(batch_size=1):
        assert batch.response_mask.all()
        assert batch.prompt_mask.all()
        assert batch.response_ids.shape == batch.advantages.shape == (1, batch.response_ids[0, 0] + 1)


def test_one_row_is_a_minibatch_of_one():
    dataset = ExperienceDataset(N)
    dataset.experience = experience()
    assert dataset[[3]].response_ids.tolist() == [[3, 3, 3, 3]]


# --- rows that stay together --------------------------------------------------------------------------------------


def pairs(batch_size=2, world_size=1, rank=0, passes=2):
    """Rows 2i and 2i + 1 are a pair."""
    dataset = ExperienceDataset(N, together=2)
    dataset.experience = experience()
    made = experience_loader(dataset, batch_size, passes, 0, world_size, rank)
    made.sampler.set_epoch(0)
    return [batch.response_ids[:, 0].tolist() for batch in made]


@pytest.mark.parametrize("batch_size", [2, 6])
def test_minibatches_never_part_a_pair(batch_size):
    batches = pairs(batch_size)
    assert [len(batch) for batch in batches] == [batch_size] * (2 * N // batch_size)
    for batch in batches:
        assert all(
            first % 2 == 0 and second == first + 1 for first, second in zip(batch[::2], batch[1::2], strict=True)
        )
    seen = [row for batch in batches for row in batch]
    assert sorted(seen[:N]) == sorted(seen[N:]) == list(range(N))
    assert seen[:N] != seen[N:]


def test_ranks_share_out_pairs():
    ranks = [pairs(2, world_size=2, rank=rank) for rank in (0, 1)]
    # Three pairs over two ranks: a step has one or two pairs of each.
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in pairs(6)]
    for batch in [*ranks[0], *ranks[1]]:
        assert all(
            first % 2 == 0 and second == first + 1 for first, second in zip(batch[::2], batch[1::2], strict=True)
        )


def test_columns_of_one_number_a_row_go_along():
    dataset = ExperienceDataset(N, together=2)
    whole = experience()
    dataset.experience = PairExperience(*whole[:4], whole.logprobs, torch.arange(N) / 10)
    found = dataset[[2, 0]]
    assert isinstance(found, PairExperience)
    torch.testing.assert_close(found.preference, torch.tensor([0.4, 0.5, 0.0, 0.1]))
    assert found.response_ids[:, 0].tolist() == [4, 5, 0, 1]
    assert found.ref_logprobs.shape == found.response_ids.shape == (4, 6)
    assert len(dataset) == 3
