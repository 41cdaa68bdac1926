"""Samples put together and chosen from: every field follows its row."""

import pytest
import torch

from lightning_rlhf.modules import samples as samples_module
from lightning_rlhf.modules.rollout import Rollout
from lightning_rlhf.modules.samples import Samples, chosen, joined, of_ranks, repeated
from lightning_rlhf.modules.scoring import Scores


def numbered(first, lengths, width):
    """Samples whose every field says which row it is of; prompts of these lengths, padded on the left to a width."""
    rows = torch.arange(first, first + len(lengths))
    prompt_mask = torch.arange(width).flip(0) < torch.tensor(lengths)[:, None]
    response = rows[:, None].expand(-1, 3)
    rollout = Rollout(rows[:, None] * prompt_mask, prompt_mask, response, response > 0, rows % 2 == 0, response.float())
    scores = Scores(rows.float(), {"a": rows * 10.0, "b": rows * 100.0})
    return Samples([f"p{i}" for i in rows.tolist()], [f"r{i}" for i in rows.tolist()], rollout, scores)


def assert_rows(found, rows, width):
    """Each field of the samples is of these rows, in this order."""
    assert found.prompts == [f"p{i}" for i in rows]
    assert found.responses == [f"r{i}" for i in rows]
    assert isinstance(found.rollout, Rollout)
    assert isinstance(found.scores, Scores)
    assert found.rollout.prompt_ids.shape == found.rollout.prompt_mask.shape == (len(rows), width)
    assert torch.equal(found.rollout.prompt_ids, torch.tensor(rows)[:, None] * found.rollout.prompt_mask)
    assert found.rollout.prompt_mask.sum(1).tolist() == [1 + i % 3 for i in rows]
    assert found.rollout.prompt_mask[:, -1].all()  # still on the right
    assert found.rollout.prompt_mask.dtype == torch.bool
    assert found.rollout.response_ids[:, 0].tolist() == rows
    assert found.rollout.response_mask.shape == (len(rows), 3)
    assert found.rollout.ended.tolist() == [i % 2 == 0 for i in rows]
    assert found.scores.total.tolist() == rows
    assert found.scores.components["a"].tolist() == [10 * i for i in rows]
    assert found.scores.components["b"].tolist() == [100 * i for i in rows]
    assert found.scores.per_token is None


@pytest.fixture
def parts():
    """Rows 1 and 2, and rows 3, 4, 5, of unequal width; row i has a prompt of 1 + i % 3."""
    return numbered(1, [2, 3], width=3), numbered(3, [1, 2, 3], width=5)


def test_joined_samples_keep_every_row(parts):
    assert_rows(joined(parts), [1, 2, 3, 4, 5], width=5)
    assert_rows(joined(parts[::-1]), [3, 4, 5, 1, 2], width=5)
    assert_rows(joined(parts[:1]), [1, 2], width=3)


@pytest.mark.parametrize("rows", [[0], [4, 1], [2, 2, 0], [4, 3, 2, 1, 0]], ids=str)
def test_chosen_rows_come_in_the_order_asked_for(parts, rows):
    assert_rows(chosen(joined(parts), rows), [i + 1 for i in rows], width=5)


def test_chosen_takes_rewards_of_tokens_along(parts):
    per_token = torch.arange(6.0).view(2, 3)
    samples = parts[0]._replace(scores=parts[0].scores._replace(per_token=per_token))
    assert chosen(samples, [1]).scores.per_token.tolist() == [[3, 4, 5]]
    assert joined([samples, samples]).scores.per_token.tolist() == [*per_token.tolist(), *per_token.tolist()]


def test_repeated_prompts_stand_next_to_each_other():
    prompts = {
        "input_ids": torch.tensor([[0, 1], [2, 3]]),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
        "prompts": ["a", "b"],
        "columns": {"n": [7, 8], "name": ["x", "y"]},
    }
    found = repeated(prompts, 3)
    assert found["input_ids"].tolist() == [[0, 1]] * 3 + [[2, 3]] * 3
    assert found["attention_mask"].tolist() == [[0, 1]] * 3 + [[1, 1]] * 3
    assert found["prompts"] == ["a"] * 3 + ["b"] * 3
    assert found["columns"] == {"n": [7, 7, 7, 8, 8, 8], "name": ["x"] * 3 + ["y"] * 3}
    assert repeated(prompts, 1)["columns"] == prompts["columns"]


def test_one_process_has_all_samples_itself(parts):
    assert of_ranks(parts[0]) is parts[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_samples_of_ranks_come_in_their_order(parts, monkeypatch, rank):
    """With the other rank's part as it would be received."""

    def gather(received, mine):
        received[:] = parts
        assert torch.equal(mine.rollout.response_ids, parts[rank].rollout.response_ids)

    monkeypatch.setattr(samples_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(samples_module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(samples_module.dist, "all_gather_object", gather)
    assert_rows(of_ranks(parts[rank]), [1, 2, 3, 4, 5], width=5)
