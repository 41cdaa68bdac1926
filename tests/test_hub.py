"""Pushing to a hub: what is checked before, what arrives, what is said when nothing does. The hub here is a fake."""

import base64
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest

from lightning_rlhf import hub
from lightning_rlhf.hub import PushError, check_push, push


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files takes."""

    def log_message(self, *_):
        pass

    def answer(self, body, status=200):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
        server = self.server
        if self.path == "/api/repos/create":
            server.created = json.loads(sent)
            repo = server.created["name"]
            return self.answer({"url": f"{server.url}/me/{repo}", "name": f"me/{repo}", "id": f"me/{repo}"})
        if self.path == "/api/validate-yaml":  # the header of README.md
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(sent)["files"]]
            return self.answer({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        if server.broken:
            return self.answer({"error": "out of order"}, status=400)
        lines = [json.loads(line)["value"] for line in sent.splitlines()]
        server.files |= {f["path"]: base64.b64decode(f["content"]) for f in lines if "path" in f}
        return self.answer({"success": True, "commitUrl": f"{server.url}/me/x/commit/1", "commitOid": "1"})


@pytest.fixture
def server(monkeypatch):
    """A hub on this machine, to which `push` talks."""
    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    server.url, server.files, server.created, server.broken = f"http://127.0.0.1:{server.server_port}", {}, None, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(hub, "HfApi", partial(huggingface_hub.HfApi, endpoint=server.url, token="hf_fake"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md", "old.bin", "state.pt", "last.ckpt"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("private", [True, False])
def test_the_folder_arrives_without_pickles(private, server, folder):
    address = push(folder, "me/fine", private)
    assert server.created["name"] == "fine"
    told = (
        server.created.get("private"),
        server.created.get("visibility"),
    )  # old or new
    assert told in [(private, None), (None, "private" if private else "public")]
    expected = {name: name.encode() for name in ("config.json", "model.safetensors", "README.md")}
    assert {name: content for name, content in server.files.items() if name != ".gitattributes"} == expected
    assert address == f"{server.url}/me/fine"


def test_a_failure_says_how_to_push_later(server, folder):
    server.broken = True
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(PushError, match=r"model` was not pushed.*`hf upload me/fine .*/model --private`"):
        push(folder, "me/fine")
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    with pytest.raises(PushError, match=r"`hf upload me/fine .*/model`"):
        push(folder, "me/fine", private=False)


class TestChecks:
    @pytest.fixture(autouse=True)
    def _online(self, monkeypatch):
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "get_token", lambda: "hf_fake")

    def test_a_good_one_passes(self):
        check_push("owner/name")
        check_push("name")

    @pytest.mark.parametrize("repo", ["", "a/b/c", "a b", "owner/na--me", "/abs"])
    def test_a_bad_name(self, repo):
        with pytest.raises(ValueError, match="`push_to_hub` must be `name` or `owner/name`, but got"):
            check_push(repo)

    def test_no_token(self, monkeypatch):
        monkeypatch.setattr(hub, "get_token", lambda: None)
        with pytest.raises(ValueError, match=r"'a/b' needs a token: run `hf auth login`, or set HF_TOKEN"):
            check_push("a/b")

    def test_offline(self, monkeypatch):
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
            check_push("a/b")
