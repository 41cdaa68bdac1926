"""Model specs: hub ids, folders and packages with a GGUF file."""

import json
import sys
from pathlib import Path

import pytest
from conftest import make_tokenizer
from transformers import GPT2Config

from lightning_rlhf.pretrained import cache_folder, load_config, load_tokenizer, resolve


@pytest.fixture
def package(monkeypatch, tmp_path):
    """An importable package with the files named."""
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def make(*files):
        folder = tmp_path / "site" / "tiny_weights"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        for name in files:
            (folder / name).write_bytes(b"GGUF, but not really")
        return folder

    yield make
    sys.modules.pop("tiny_weights", None)


def test_the_cache_moves_with_its_variable(monkeypatch):
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "lightning_rlhf"


def test_hub_ids_and_folders_stand_for_themselves(tmp_path):
    assert resolve("owner/name") == "owner/name"
    assert resolve(str(tmp_path)) == str(tmp_path)


def test_every_dropout_is_0(tmp_path):
    GPT2Config(attn_pdrop=0.1, resid_pdrop=0.2, embd_pdrop=0.3, summary_first_dropout=0.4).save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop, config.summary_first_dropout) == (0, 0, 0, 0)
    assert config.layer_norm_epsilon == 1e-5  # and nothing else


def test_a_tokenizer_without_pad_token_pads_with_eos(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == 0


def test_a_pad_token_of_its_own_stays(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "~"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.pad_token, loaded.eos_token) == ("~", "<eos>")


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"The tokenizer of `{tmp_path}` has no EOS token.*Set `eos_token`"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_what_is_not_a_model_is_named(load, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    missing = tmp_path / "missing" / "deeply"
    for spec, why in [(tmp_path, "expected a local folder written by `save_pretrained`"), (missing, "no such folder")]:
        with pytest.raises(ValueError, match=f"`{spec}` is not a model.*{why}"):
            load(str(spec))


@pytest.mark.parametrize("name", ["no_such_package_at_all", "not-an-identifier", "os.path", ""])
def test_a_package_that_is_not_installed_is_named(name):
    with pytest.raises(ValueError, match=f"`package:{name}`: no installed package of that name. Install it first"):
        resolve(f"package:{name}")


@pytest.mark.parametrize("files", [(), ("a.gguf", "b.gguf")])
def test_a_package_must_hold_one_gguf_file(package, files):
    package(*files)
    with pytest.raises(ValueError, match=r"`package:tiny_weights`: expected one \.gguf file in the package, found"):
        resolve("package:tiny_weights")


def test_a_package_that_was_converted_is_read_from_the_cache(package, tmp_path):
    size = (package("w.gguf") / "w.gguf").stat().st_size
    converted = tmp_path / "cache" / "packages" / f"tiny_weights-{size}"
    converted.mkdir(parents=True)
    make_tokenizer().save_pretrained(converted)
    assert resolve("package:tiny_weights") == str(converted)
    assert load_tokenizer("package:tiny_weights").eos_token == "<eos>"


def test_a_failed_conversion_leaves_no_folder_behind(package, tmp_path):
    package("w.gguf")
    with pytest.raises(Exception, match=r".+"):
        resolve("package:tiny_weights")
    assert [p for p in (tmp_path / "cache" / "packages").iterdir() if p.is_dir()] == []
