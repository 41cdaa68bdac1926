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


@pytest.fixture
def module(fit):
    """Untrained; remembers with which arguments it was saved."""
    module = fit([], max_epochs=0)[0]
    module.save_pretrained = lambda *given, **options: module.exported.append((*given, options))
    return module


@pytest.mark.parametrize(("lora", "options"), [("merged", {}), ("adapter", {"merge": False})])
def test_an_adapter_is_saved_if_asked_for(lora, options, fit, tmp_path, module):
    module.save_hyperparameters({"lora_r": 4})
    fit([HuggingFaceExport(lora=lora)], module=module)
    assert module.exported == [(tmp_path / "model", options)]


@pytest.mark.parametrize("hyperparameters", [{}, {"lora_r": 0}], ids=str)
def test_without_lora_an_adapter_is_refused_before_training(hyperparameters, fit, module):
    module.save_hyperparameters(hyperparameters)
    with pytest.raises(ValueError, match="`lora_r` is 0"):
        fit([HuggingFaceExport(lora="adapter")], module=module)
    assert module.trace == module.exported == []


def test_with_4_bits_only_the_adapter_is_written(fit, module):
    module.save_hyperparameters({"lora_r": 4, "load_in_4bit": True})
    with pytest.raises(ValueError, match=r"`HuggingFaceExport\(lora=merged\)`: with `load_in_4bit`.*`lora: adapter`"):
        fit([HuggingFaceExport()], module=module)
    assert module.trace == module.exported == []
    fit([HuggingFaceExport(lora="adapter")], module=module)
    assert len(module.exported) == 1
