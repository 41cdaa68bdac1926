import torch

from lightning_rlhf.train import default_callbacks


def test_callbacks_change_nothing(fit):
    bare, _ = fit([], max_epochs=3)
    watched, _ = fit(default_callbacks(), max_epochs=3, enable_progress_bar=True)
    assert watched.trace == bare.trace
    for name, parameter in bare.state_dict().items():
        assert torch.equal(parameter, watched.state_dict()[name]), name
