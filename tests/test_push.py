"""Protects `hcnet push`: what arrives at the hub is the folder that timm loads, and nothing is sent unasked.

The hub is a stand-in on this machine that speaks its HTTP interface to the real client, huggingface_hub.
"""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Hcnet, only_run
from huggingface_hub import constants
from safetensors.torch import load

from hcnet_cli import push
from hcnet_cli.console import UserError
from hcnet_cli.report.card import read_card

TOKEN = "hf_of_the_stand_in"


class Hub(ThreadingHTTPServer):
    """Repositories by name, each with its files; large files come as in Git LFS, the others inside the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuse = 0  # the status of every answer, if not 0


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {self.path}")
        own = self.path.startswith("/api/") or ".git/" in self.path
        status = self.server.refuse if own else 0
        if own and self.path != "/api/agent-harnesses" and self.headers["Authorization"] != f"Bearer {TOKEN}":
            status = 401
        found = {"error": "no"} if status else self.content(body)
        text = json.dumps(found).encode()
        self.send_response(status or 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = answer  # noqa: N815

    def content(self, body: bytes) -> dict[str, Any]:
        hub, path = self.server, self.path.strip("/")
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name not in hub.repositories and asked.get("visibility") == "private":
                hub.private.add(name)
            hub.repositories.setdefault(name, {})
            return {"url": f"{hub.address}/{name}"}
        if path == "api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return {"files": [{"path": one["path"], "shouldIgnore": False, "uploadMode": mode(one)} for one in files]}
        if path.endswith("/info/lfs/objects/batch"):
            return {"objects": [self.place(one) for one in json.loads(body)["objects"]]}
        if path.startswith("large/"):
            hub.large[path.removeprefix("large/")] = body
            return {}
        if path.endswith("/commit/main"):
            name = path.removeprefix("api/models/").removesuffix("/commit/main")
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                if entry["key"] == "lfsFile":
                    hub.repositories[name][value["path"]] = hub.large[value["oid"]]
            return {"commitUrl": f"{hub.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}
        name = path.removeprefix("api/models/")
        return {"id": name, "private": name in hub.private, "sha": "0" * 40, "siblings": []}

    def place(self, one: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.address}/large/{one['oid']}"
        return {**one, "authenticated": True, "actions": {"upload": {"href": href, "header": {}}}}


def mode(file: dict[str, Any]) -> str:
    return "lfs" if file["path"].endswith(".safetensors") else "regular"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, which the client takes for the hub, and a token for it."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, in a library of its own
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_folder_arrives(small_classifier: Path, hub: Hub, hcnet: Hcnet, tmp_path: Path) -> None:
    run = only_run(small_classifier / "results")
    done = hcnet("push", run, "--to", "me/model", "--private")
    assert done.code == 0, done.err
    assert f"Uploaded: {hub.address}/me/model" in done.err
    files = hub.repositories["me/model"]
    assert files.keys() == {"model.safetensors", "config.json", "README.md"}
    assert hub.private == {"me/model"}
    sent, own = load(files["model.safetensors"]), load((run / "best.safetensors").read_bytes())
    assert sent.keys() == own.keys()
    assert all(torch.equal(sent[name], own[name]) for name in own)
    assert json.loads(files["config.json"])["label_names"] == ["a", "b"]
    page = files["README.md"].decode()
    assert page.startswith("---\nlibrary_name: timm\n")
    assert 'timm.create_model("hf-hub:me/model", pretrained=True)' in page
    (tmp_path / "README.md").write_text(page)
    assert read_card(tmp_path / "README.md")[0].run == run.name


def test_a_dry_run_sends_nothing(
    small_classifier: Path, hub: Hub, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    run = only_run(small_classifier / "results")
    done = hcnet("push", run, "--to", "me/model", "--dry-run")
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()] == ["README.md", "config.json", "model.safetensors"]
    assert "kB" in done.out
    assert "Nothing was uploaded (--dry-run)" in done.err
    assert not hub.requests


def test_what_the_hub_refuses_is_one_sentence(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    hub.repositories["me/public"] = {}
    with pytest.raises(UserError, match="me/public exists and is public, so nothing was uploaded"):
        push._upload(made, "me/public", True, "message")
    hub.refuse = 500
    with pytest.raises(UserError, match="The hub answered 500"):
        push._upload(made, "me/model", False, "message")
    hub.refuse = 0
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(UserError, match=r"The hub refused the token for me/model \(401\)"):
        push._upload(made, "me/model", False, "message")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(UserError, match="cannot be reached"):
            push._upload(made, "me/model", False, "message")
    assert not any(hub.repositories.values())


def test_mistakes(small_classifier: Path, hub: Hub, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch) -> None:
    run = only_run(small_classifier / "results")
    for name in ("model", "me/model/more", "me/mo del", "../x", "me/"):
        done = hcnet("push", run, "--to", name)
        assert done.code == 2
        assert "--to takes USER/NAME" in done.err
    monkeypatch.delenv("HF_TOKEN")
    done = hcnet("push", run, "--to", "me/model")
    assert done.code == 2
    assert "No token of the Hugging Face hub is known." in done.err
    assert not hub.requests
