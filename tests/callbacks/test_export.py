import pytest

from lightning_rlhf.callbacks import HuggingFaceExport


def test_model_is_saved_once_when_fit_has_ended(fit, tmp_path):
    module, _ = fit([HuggingFaceExport(dirname="policy")])
    assert module.exported == [str(tmp_path / "policy")]


def test_nothing_is_saved_when_fit_fails(fit):
    module = fit([], max_epochs=1)[0]

    def fail(*_):
        raise RuntimeError("out of luck")

    module.training_step = fail
    with pytest.raises(RuntimeError, match="out of luck"):
        fit([HuggingFaceExport()], module=module)
    assert module.exported == []
