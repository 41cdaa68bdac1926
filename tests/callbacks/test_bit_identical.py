import torch

from lightning_rlhf.callbacks import HuggingFaceExport, PPOReport, ProgressBar, RNGState, SampleTable, StageSummary


def test_callbacks_change_nothing(fit):
    bare, _ = fit([], max_epochs=3)
    watchers = [SampleTable(), HuggingFaceExport(), RNGState(), StageSummary(), ProgressBar(), PPOReport()]
    watched, _ = fit(watchers, max_epochs=3, enable_progress_bar=True)
    assert watched.trace == bare.trace
    for name, parameter in bare.state_dict().items():
        assert torch.equal(parameter, watched.state_dict()[name]), name
