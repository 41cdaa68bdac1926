"""What is recorded of a run, and what must never be."""

import hashlib
import json
import os
import subprocess
from types import SimpleNamespace

import pytest
from datasets import Dataset

from lightning_rlhf import provenance
from lightning_rlhf.datamodules import PromptDataModule, SFTDataModule
from lightning_rlhf.provenance import collect, command_line, fingerprint, git_state, masked, versions

TOKEN = "hf_" + "abcDEF123456"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host:8/data", "https://***@host:8/data"),
        ("s3://KEY:SECRET@bucket/x.csv", "s3://***@bucket/x.csv"),
        ("http://host/score?api_key=abc&n=1", "http://host/score?api_key=***&n=1"),
        ('{"url": "http://h", "headers": {"Authorization": "Bearer abc.def"}}', None),
        ("accessToken: abc123", "accessToken: ***"),
        ("password = 'abc 1'", None),
        (f"the token is {TOKEN}", "the token is hf_***"),
    ],
)
def test_secrets_are_masked(text, expected):
    found = masked(text)
    assert found == (expected or found)
    for secret in ("pw@", "SECRET", "abc", TOKEN):
        assert secret not in found


@pytest.mark.parametrize(
    "text",
    [
        "--model.max_new_tokens=8 --model.tokenizer=gpt2 --data.opening_tokens=3 min_new_tokens: 4",
        "http://host/score?n=1#top me@example.org",
        "tokenizer: null, monkey: 1, aggregation: TokenMean, basics: 2",
    ],
)
def test_what_is_no_secret_stays(text):
    assert masked(text) == text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/x/train.py", "fit", "--a.max_new_tokens", "8"], "python train.py fit --a.max_new_tokens 8"),
        (["/bin/lightning-rlhf", "fit", "--hub.hf_token", TOKEN, "--b", "1"], None),
        (["t.py", "--api-key=a b", "--password", "c d"], "python t.py --api-key=*** --password ***"),
        (["t.py", "--secret", "--b", "1"], "python t.py --secret --b 1"),
        (["t.py", "--reward=http://me:pw@host/x", "two words"], "python t.py --reward=http://***@host/x 'two words'"),
        ([], ""),
    ],
)
def test_a_command_is_told_without_its_secrets(words, expected):
    expected = "lightning-rlhf fit --hub.hf_token *** --b 1" if expected is None else expected
    assert command_line(words) == expected


def test_the_environment_is_not_recorded(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "swordfish")
    monkeypatch.setenv("ANY_VARIABLE", "swordfish")
    facts = collect(["train.py", "fit"], seed=3, world_size=2)
    assert "swordfish" not in json.dumps(facts)
    assert (facts["seed"], facts["world_size"], facts["command"], facts["data"]) == (3, 2, "python train.py fit", None)
    assert facts["started"].endswith("+00:00")
    assert facts["hardware"]["cpu"]
    assert facts["hardware"]["cpu_cores"] >= 1


def test_versions_of_what_is_not_installed_are_none(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    found = versions()
    assert found["no-such-package"] is None
    assert found["torch"].split(".")[0].isdigit()
    assert found["python"].startswith("3.")


def test_gpus_are_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: f"GPU {i}")
    assert provenance.hardware()["gpus"] == ["GPU 0", "GPU 1"]


# --- git --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, and what runs git in it."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "repository"
    folder.mkdir()

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet", "--initial-branch=trunk")
    (folder / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "--message=one")
    return folder, git


def test_git_state(repository):
    folder, git = repository
    commit = git("rev-parse", "HEAD")
    assert git_state(folder) == {"commit": commit, "branch": "trunk", "dirty": False}
    (folder / "untracked").write_text("a run's folder, say")
    assert not git_state(folder)["dirty"]
    (folder / "file").write_text("2")
    assert git_state(folder)["dirty"]
    git("checkout", "--quiet", "--force", "--detach")
    assert git_state(folder) == {"commit": commit, "branch": None, "dirty": False}


def test_git_state_changes_nothing_in_the_repository(repository):
    folder, _ = repository
    os.utime(folder / "file", (1, 1))  # `git status` would refresh its index
    before = (folder / ".git/index").read_bytes()
    git_state(folder)
    assert (folder / ".git/index").read_bytes() == before


def test_there_is_no_git_state_outside_a_repository_or_without_git(tmp_path, repository, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "nowhere") is None
    monkeypatch.setenv("PATH", "")
    assert git_state(repository[0]) is None


def test_a_repository_without_a_commit_has_no_state(tmp_path, repository):
    subprocess.run(["git", "init", "--quiet", tmp_path / "empty"], check=True)
    assert git_state(tmp_path / "empty") is None


def test_a_git_that_hangs_is_given_up(monkeypatch):
    def hang(*_, timeout, **__):
        raise subprocess.TimeoutExpired("git", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert git_state() is None


# --- data -------------------------------------------------------------------------------------------------------------

ROWS = [{"text": "a"}, {"text": "é | b"}]


def data_of(rows: list[dict], **options) -> SFTDataModule:
    data = SFTDataModule(Dataset.from_list(rows), **options)
    data.setup("fit")
    return data


def test_the_hash_is_of_the_rows_as_json():
    found = fingerprint(data_of(ROWS))
    content = b'{"text": "a"}\n{"text": "\\u00e9 | b"}\n'
    train = {"rows": 2, "columns": ["text"], "sha256": hashlib.sha256(content).hexdigest(), "hashed_rows": 2}
    sources = {"data": {"name": "a Dataset object", "hub": False}}
    assert found == {"module": "SFTDataModule", "sources": sources, "splits": {"train": train}}


def test_the_hash_does_not_depend_on_the_file_format(tmp_path):
    Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")
    Dataset.from_list(ROWS).to_csv(tmp_path / "rows.csv")
    hashes = set()
    for name in ("rows.jsonl", "rows.csv"):
        data = SFTDataModule(str(tmp_path / name))
        data.setup("fit")
        found = fingerprint(data)
        assert found["sources"]["data"] == {"name": str(tmp_path / name), "hub": False}
        hashes.add(found["splits"]["train"]["sha256"])
    assert len(hashes) == 1


@pytest.mark.parametrize("changed", [ROWS[::-1], ROWS[:1], [{"text": "a"}, {"text": "b"}]])
def test_another_content_or_order_has_another_hash(changed):
    hashes = {fingerprint(data_of(rows))["splits"]["train"]["sha256"] for rows in (ROWS, changed)}
    assert len(hashes) == 2


@pytest.mark.parametrize(("bound", "hashed"), [("_HASHED_ROWS", 3), ("_HASHED_BYTES", 2)])
def test_only_the_first_of_many_rows_are_hashed(bound, hashed, monkeypatch):
    rows = [{"text": f"row {i}"} for i in range(10)]
    monkeypatch.setattr(provenance, "_ROWS_AT_ONCE", 2)
    monkeypatch.setattr(provenance, bound, 3)
    found = fingerprint(data_of(rows))["splits"]["train"]
    content = "".join(json.dumps(row) + "\n" for row in rows[:hashed]).encode()
    assert (found["rows"], found["hashed_rows"]) == (10, hashed)
    assert found["sha256"] == hashlib.sha256(content).hexdigest()


def test_hub_ids_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows").write_text("")
    names = {"owner/name": True, "owner/name:config": True, "data/rows": False, "rows.csv": False, "vader:x": False}
    for name, on_hub in names.items():
        assert fingerprint(PromptDataModule(name))["sources"] == {"data": {"name": name, "hub": on_hub}}


def test_of_a_datamodule_of_somebody_else_only_the_name_is_known():
    assert fingerprint(SimpleNamespace()) == {"module": "SimpleNamespace", "sources": {}, "splits": {}}
