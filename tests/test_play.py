"""play.py: a client of the standard library beside the models themselves."""
import http.client
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
import torch
from conftest import continuation, succeed
from torch.nn import functional as F

import play
from kronygpt.checkpoint import load
from kronygpt.configurator import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TEXT = "Hä? 😀 A text that is longer than one context of 32 bytes, and ends within the third."


@pytest.fixture(scope="module")
def served(gpt2_dir, tmp_path_factory):
    """A server of a dense model and one made of it, both with a context of 32 bytes."""
    small = tmp_path_factory.mktemp("small") / "small.pt"
    succeed("kron_decompose.py", 64, 128, 1, f"--init_from={gpt2_dir}", f"--out={small}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(play, "port", 0)
        server = play.Server([play.load_player(str(source)) for source in (gpt2_dir, small)])
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def connect(server, path, body=None, headers=None):
    """The response to a GET, or to a POST of a body."""
    connection = http.client.HTTPConnection(play.HOST, server.server_port, timeout=20)
    connection.request("GET" if body is None else "POST", path, body, headers or {})
    return connection.getresponse()


def ask(server, path, **request):
    """The events that a request gets."""
    response = connect(server, path, json.dumps(request))
    assert response.status == 200, response.read()
    return [json.loads(line) for line in response]


def expected(player, prompt, n, seed):
    """The text that generate() adds to the bytes of a prompt."""
    tokens = list(prompt.encode())
    row = continuation(player.model, torch.tensor([tokens]), n, 0.8, 50, seed)[0]
    return bytes(row[len(tokens):].tolist()).decode(errors="replace")


def test_a_port_that_is_taken_is_named(served, monkeypatch):
    monkeypatch.setattr(play, "port", served.server_port)
    with pytest.raises(UserError, match=f"--port={served.server_port}: .*in use; --port=0 takes any that is free"):
        play.Server([])


@pytest.mark.parametrize("model", [0, 1])
@pytest.mark.parametrize("prompt", ["The", "👩‍👩‍👧 é", "a prompt that is longer than the context of the model"])
def test_the_stream_is_what_generate_returns(model, prompt, served):
    events = ask(served, "/generate", model=model, prompt=prompt, max_new_tokens=40, temperature=0.8, top_k=50, seed=5)
    assert "".join(event["text"] for event in events) == expected(served.players[model], prompt, 40, 5)
    assert [event["tokens"] for event in events[:40]] == list(range(1, 41))
    n = len(prompt.encode())
    assert all((event["prompt"], event["seen"]) == (n, min(n, 32)) for event in events)
    assert events[0]["tokens_per_second"] is None and all(event["tokens_per_second"] > 0 for event in events[1:])


@pytest.mark.parametrize("model", [0, 1])
def test_the_loss_is_a_plain_cross_entropy(model, served):
    tokens = torch.from_numpy(np.frombuffer(TEXT.encode(), np.uint8).astype("int64"))
    losses = []
    for begin in range(0, len(tokens), 32):
        window = tokens[begin:begin + 32]
        with torch.no_grad():
            log_p = F.log_softmax(served.players[model].model(window[None])[0], dim=-1)
        losses += [-log_p[i, window[i + 1]].item() for i in range(len(window) - 1)]
    last = ask(served, "/loss", model=model, text=TEXT)[-1]
    assert last["tokens"] == last["of"] == len(losses)
    assert last["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_page_says_what_the_models_are(served, gpt2_dir):
    facts = json.load(connect(served, "/models"))
    dense, compressed = facts["models"]
    n = sum(p.numel() for p in load(str(gpt2_dir))[0].parameters())
    assert (dense["kind"], dense["parameters"], dense["bytes"], dense["context"]) == ("dense", n, 4 * n, 32)
    assert compressed["kind"] == "compressed" and compressed["parameters"] < n
    assert facts["controls"]["max_new_tokens"] == 200


def test_the_page_loads_nothing_from_elsewhere(served):
    response = connect(served, "/")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    page = response.read().decode()
    assert "<title>KronyGPT" in page and "//" not in page.replace(" // ", "")


def test_two_tabs_take_turns(served):
    """While one is in the middle of an endless text, another gets its own, undisturbed, and then the first continues."""
    first = connect(served, "/generate", json.dumps(dict(model=0, prompt="a", max_new_tokens=10**6)))
    first.readline()
    events = ask(served, "/generate", model=0, prompt="b", max_new_tokens=20, temperature=0.8, top_k=50, seed=3)
    assert "".join(event["text"] for event in events) == expected(served.players[0], "b", 20, 3)
    assert json.loads(first.readline())["tokens"] == 2
    first.close()


def test_generation_stops_when_the_client_goes_away(served, monkeypatch, capfd):
    made, generate = [], served.players[0].model.generate

    def counted(*args):
        for token in generate(*args):
            made.append(token)
            yield token

    monkeypatch.setattr(served.players[0].model, "generate", counted, raising=False)
    response = connect(served, "/generate", json.dumps(dict(model=0, prompt="a", max_new_tokens=10**6)))
    response.readline()
    response.close()
    n, deadline = -1, time.monotonic() + 10
    while n != len(made) and time.monotonic() < deadline:
        n = len(made)
        time.sleep(0.1)
    assert n == len(made) > 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("path, body, message", [
    ("/generate", "", "JSONDecodeError"), ("/generate", '{"model": 7}', "IndexError"),
    ("/generate", '{"model": 0, "temperature": NaN}', "RuntimeError"), ("/loss", '{"model": 0}', "KeyError: 'text'"),
    ("/loss", '{"model": 0, "text": "a"}', "two tokens or more"),
])
def test_a_wrong_request_gets_one_line_and_the_server_lives(path, body, message, served, capfd):
    line, = connect(served, path, body)
    said = json.loads(line)["error"]
    assert message in said and "\n" not in said and len(said) < 400
    assert ask(served, "/loss", model=0, text="ab")[-1]["tokens"] == 1
    assert capfd.readouterr().err == ""


class Panic(BaseException):
    """What a library in Rust raises."""


def test_an_error_in_the_middle_ends_the_stream_with_a_line(served, monkeypatch):
    def failing(*args):
        yield torch.tensor([[65]])
        raise Panic("at\n7")

    monkeypatch.setattr(served.players[0].model, "generate", failing, raising=False)
    events = ask(served, "/generate", model=0, prompt="a", max_new_tokens=9)
    assert events[0]["text"] == "A" and events[1:] == [{"error": "Panic: at 7"}]


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example:80"}, {"Host": ""},
                                     {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_only_the_page_itself_is_answered(headers, served):
    for path, body in (("/", None), ("/models", None), ("/loss", '{"model": 0, "text": "ab"}')):
        response = connect(served, path, body, headers)
        assert response.status == 403 and response.read().decode().startswith("the page is at http://127.0.0.1:")


def test_the_address_is_the_loopback_alone(served):
    assert served.server_address[0] == "127.0.0.1"
    port = served.server_port
    assert connect(served, "/", headers={"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}).status == 200


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_the_page_works_in_a_browser(served, tmp_path, monkeypatch):
    """A script submits both forms and sends what the page then shows."""
    page, shown = tmp_path / "page.html", queue.Queue()
    page.write_text(play.PAGE.read_text(encoding="utf-8") + """<script>
        let submitted = false;
        setInterval(() => {
          if (models.length < 2 || document.querySelector("button[type=submit]:disabled")) return;
          if (submitted)
            return fetch("/shown", {method: "POST", body: JSON.stringify({model: 0, text: document.body.textContent})});
          submitted = true;
          element("play").elements.prompt.value = "😀";
          element("play").elements.max_new_tokens.value = 12;
          element("loss").elements.text.value = "A text";
          for (const form of document.forms) form.requestSubmit();
        }, 50)</script>""", encoding="utf-8")
    monkeypatch.setattr(play, "PAGE", page)
    monkeypatch.setitem(play.ACTIONS, "/shown", lambda player, request: shown.put(request["text"]) or iter(()))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    browser = subprocess.Popen([CHROMIUM, *options, f"http://{play.HOST}:{served.server_port}/"], start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        text = shown.get(timeout=60)
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
    assert text.count("12 of 12 tokens") == 2
    for model in (0, 1):
        events = ask(served, "/generate", model=model, prompt="😀", max_new_tokens=12)
        assert "😀" + "".join(event["text"] for event in events) + "12 of 12" in text
        assert f"{ask(served, '/loss', model=model, text='A text')[-1]['loss']:.4f}" in text
