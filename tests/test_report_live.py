"""Protects `hcnet report --watch`: the page follows the runs, in a real browser too; nothing else is served, and to
this machine alone.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from conftest import Hcnet
from synthetic_runs import make_run
from synthetic_studies import study_of

from hcnet_cli.console import UserError
from hcnet_cli.report import report
from hcnet_cli.report.serve import LivePage, server

needs_chromium = pytest.mark.skipif(chromium.find() is None, reason="no chromium or chrome here")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    make_run(tmp_path, score=98.0)
    make_run(tmp_path, seed=1, done=0.4, status="running")
    record = study_of(tmp_path, {"full": (98.5,), "no-gate": (97.5,)}, no_gate_0={"done": 0.5, "status": "failed"})
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "s.json").write_text(record.model_dump_json())
    return tmp_path


@pytest.fixture
def port(results: Path) -> Iterator[int]:
    live = LivePage([results], lambda version: report([results], fmt="html", version=version))
    with server(live, 0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running.server_port
        running.shutdown()
        thread.join()


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_is_made_again_when_a_run_changes(port: int, results: Path) -> None:
    status, text = get(port, "/")
    _, version = get(port, "/version")
    assert status == 200
    assert f'data-version="{version}"' in text
    assert get(port, "/") == (200, text)
    make_run(results, seed=5, score=99.0, name="another-run")
    assert get(port, "/version")[1] != version
    assert "another-run" in get(port, "/")[1]
    assert "another-run" not in text


def test_every_cell_of_a_study_is_on_the_served_page_alone(port: int, results: Path) -> None:
    _, text = get(port, "/")
    cells = re.findall(r'<li class="(\w+)"><b>([^<]+)</b>', text)
    assert sorted(state for state, _ in cells) == ["failed", "finished"]
    assert "top1 98.50" in text
    assert 'id="studies"' not in report([results], fmt="html")


@pytest.mark.parametrize("path", ["/runs/", "/../run.json", "/%2e%2e/etc/passwd", "//etc/passwd", "/?a=/etc/passwd"])
def test_nothing_but_the_page_is_served(path: str, port: int, results: Path) -> None:
    assert get(port, path) == (404, "There is one page: /\n")
    assert get(port, "/", Host="stranger.example")[0] == 403  # a page of others that leads a name here
    assert get(port, "/", Host=f"localhost:{port}")[0] == 200


def test_only_this_machine_reaches_it() -> None:
    with server(LivePage([], str), 0) as running:
        assert running.socket.getsockname()[0] == "127.0.0.1"
        with pytest.raises(UserError, match=f"Port {running.server_port} is in use"):
            server(LivePage([], str), running.server_port)


def test_ctrl_c_ends_it_with_exit_code_0(hcnet: Hcnet, results: Path) -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = []

    def browse() -> None:
        for _ in range(200):
            try:
                answers.append(get(port, "/")[0])
                break
            except ConnectionError:
                threading.Event().wait(0.1)
        stop()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    thread = threading.Thread(target=browse)
    thread.start()
    done = hcnet("report", "--watch", "--results", results, "--port", port)
    thread.join()
    signal.signal(signal.SIGINT, before)
    assert answers == [200]
    assert done.code == 0, done.err
    assert f"The page is at http://127.0.0.1:{port}/" in done.err
    assert done.err.endswith("Ended.\n")


@needs_chromium
def test_a_browser_follows_the_runs_and_keeps_its_place(port: int, results: Path) -> None:
    """On a phone: a run that is added appears by itself, and what was chosen and opened stays so."""
    with chromium.page() as tab:
        tab.view(390)
        tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
        tab.wait("Page.loadEventFired")
        assert tab.js("document.querySelector('#live').textContent") == "live"
        assert tab.js("document.documentElement.scrollWidth") <= 390
        tab.js("document.querySelector('#curve-runs input').click()")
        tab.js("document.querySelector('#run-list > details').open = true")
        make_run(results, seed=7, score=97.0, name="a-late-run")
        tab.wait("Page.loadEventFired")
        assert tab.js("document.body.textContent.includes('a-late-run')")
        assert tab.js("[...document.querySelectorAll('#curve-runs input')].filter(box => !box.checked).length") == 1
        assert tab.js("document.querySelectorAll('#run-list > details[open]').length") == 1
        own = f"request to http://127.0.0.1:{port}/"
        assert [error for error in tab.errors if not error.startswith(own)] == []
