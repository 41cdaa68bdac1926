import math

import pytest
import torch

from lightning_rlhf.modules.running import Largest, Mean, Smallest


def test_the_mean_is_over_items_not_over_batches():
    metric = Mean()
    metric.update(torch.tensor(1.0), torch.tensor(1))
    metric.update(torch.tensor(11.0), torch.tensor(3))
    metric.update(torch.tensor(0.0), torch.tensor(0))
    assert metric.compute() == 3.0
    metric.update(torch.tensor(torch.nan), torch.tensor(1))
    assert metric.compute().isnan()
    metric.reset()
    metric.update(torch.tensor(0.0), torch.tensor(0))
    assert metric.compute().isnan()


@pytest.mark.parametrize(("kind", "expected", "empty"), [(Largest, 4.0, -math.inf), (Smallest, -3.0, math.inf)])
def test_extremes_are_over_all_batches(kind, expected, empty):
    metric = kind()
    metric.update(torch.tensor([[1.0, -3.0], [0.5, 2.0]]))
    metric.update(torch.tensor([4.0]))
    metric.update(torch.tensor([]))
    assert metric.compute().item() == expected
    metric.reset()
    metric.update(torch.tensor([]))
    assert metric.compute().item() == empty


@pytest.mark.parametrize("kind", [Mean, Largest, Smallest])
def test_two_ranks_that_resume_have_what_one_had(kind):
    def parts(values):
        return (values.sum(), torch.tensor(len(values))) if kind is Mean else (values,)

    before, after = torch.tensor([2.0, 9.0, -1.0]), torch.tensor([3.0, 3.5])
    whole, seen = kind(), kind()
    whole.update(*parts(torch.cat([before, after])))
    seen.update(*parts(before))
    ranks = [kind(), kind()]
    for rank, metric in enumerate(ranks):
        metric.resume(seen.state, rank)
        metric.update(*parts(after[rank : rank + 1]))
    merge = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}[kind.reduce_op]
    ranks[0].state = merge(torch.stack([metric.state for metric in ranks]), dim=0)
    assert ranks[0].compute() == whole.compute()
