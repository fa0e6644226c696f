"""A web page to play with one or two models: the same prompt, tokens as they come, speed, size, and the loss on a text.

    python play.py out/demo/dense_trained_further_128_512_1/seed_1337/best.pt out/demo/small
    python play.py gpt2 checkpoints/best_82M.pt --port=8001 --temperature=1

A model is a .pt file, a Hugging Face directory, a name under models/ or a hub name: a dense one first, then one made of it.
If the second one was trained further, so should the first one be: that is the fair pair. The page is served to this machine
alone, and loads nothing from elsewhere. It asks one model after the other, so that each has the machine for itself; several
pages take turns, one token each. Ctrl-C ends it.
"""
import itertools
import json
import re
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from kronygpt import checkpoint, data
from kronygpt.configurator import UserError, run
from kronygpt.device import pick_device
from kronygpt.tokenizer import open_tokenizer, stream_text

port = 8017  # port of the page at 127.0.0.1; 0 takes any that is free
prompt = "The function returns"  # prompt that the page starts with; the next four options set its other fields
max_new_tokens = 200  # tokens to add
temperature = 0.8  # divides the logits; 0 takes the most likely token
top_k = 200  # sample among the N most likely tokens; 0 for all
seed = 1337  # seed for sampling
tokenizer: str | None = None  # directory of the tokenizer; default: the model's
device = ""  # cuda, mps, cpu, ...; default: CUDA if available, else Apple's mps, else the CPU
dtype = "float32"  # type of the weights and of all that is computed: float32, bfloat16 or float16

CONTROLS = ("prompt", "max_new_tokens", "temperature", "top_k", "seed")
HOST = "127.0.0.1"
PAGE = Path(__file__).parent / "kronygpt" / "play.html"
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
          "frame-ancestors 'none'")


Player = namedtuple("Player", "model tokenizer facts")  # a KronyGPT on its device, and what the page says of it


def load_player(ckpt):
    model, _ = checkpoint.load(ckpt, as_stored=True)
    text_tokenizer = open_tokenizer(model.config, tokenizer)
    model.to(pick_device(device), getattr(torch, dtype)).eval()
    facts = dict(name=ckpt, kind="dense" if all(member.is_dense for member in model.members()) else "compressed",
                 parameters=model.count_parameters()["total"], context=model.config.block_size,
                 bytes=sum(p.numel() * p.element_size() for p in model.parameters()))
    return Player(model, text_tokenizer, facts)


def generate(player, request):
    """Yield {"text", "tokens", "of", "tokens_per_second", "prompt", "seen"} after each new token: the last two are the
    tokens of the prompt, and how many of them the model sees. The speed is that after the first token, which reads the
    prompt."""
    text, n, divisor, k, number = (type(globals()[name])(request.get(name, globals()[name])) for name in CONTROLS)
    tokens, context = player.tokenizer.encode_prompt(text), player.model.config.block_size
    idx = torch.tensor([tokens], device=next(player.model.parameters()).device)
    new = (token.item() for token in player.model.generate(idx, n, divisor, k or None, number))
    texts, seconds = stream_text(player.tokenizer, new, tokens[-1]), 0.0
    for done in itertools.count(1):
        start = time.perf_counter()
        if (text := next(texts, None)) is None:
            return
        seconds += time.perf_counter() - start if done > 1 else 0
        n_new = min(done, n)  # an incomplete character comes after the last token
        yield dict(text=text, tokens=n_new, of=n, prompt=len(tokens), seen=min(len(tokens), context),
                   tokens_per_second=(n_new - 1) / seconds if seconds else None)


def score(player, request):
    """Yield {"loss": nats per token so far, "tokens", "of"} after each window of the text. Windows do not overlap, and the
    first token of each is not scored, as in perplexity.py."""
    tokens, context = player.tokenizer.encode(request["text"]), player.model.config.block_size
    windows = data.sliding_windows(len(tokens), context, context)
    if not windows:
        raise UserError("a token is scored by those before it: give a text of two tokens or more")
    for total, n in data.score(player.model, tokens, windows, batch_size=1):
        yield dict(loss=total / n, tokens=n, of=sum(end - first for _, first, end in windows))


def in_one_line(error):
    """What an error says on the page."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


ACTIONS = {"/generate": generate, "/loss": score}


class Server(ThreadingHTTPServer):
    """Serves the page and its players. One thread runs the models, one token or window at a time, so that requests share the
    machine in turns; the others wait for it and talk to the clients."""

    def __init__(self, players):
        self.players = players
        self.worker = ThreadPoolExecutor(max_workers=1)
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UserError(f"--port={port}: {error.strerror}; --port=0 takes any that is free", status=1) from None

    def next_event(self, events):
        """The next of a request's events, or None after the last."""
        def step():
            with torch.no_grad():
                return next(events, None)

        return self.worker.submit(step).result()

    def server_close(self):
        super().server_close()
        self.worker.shutdown(cancel_futures=True)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # else the client has gone
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET / and /models, POST /generate and /loss; the answer to a POST is a line of JSON for each event or error."""

    def parse_request(self):
        """Also refuse what does not come from the page: other names of this machine (DNS rebinding), other sites."""
        if not super().parse_request():
            return False
        host = self.headers.get("Host", "")
        is_ours = re.fullmatch(rf"({re.escape(HOST)}|localhost)(:\d+)?", host)
        if not is_ours or self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            self.reply(403, f"the page is at http://{HOST}:{self.server.server_port}")
            return False
        return True

    def reply(self, status, content, kind="text/plain"):
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content.encode())

    def do_GET(self):
        if self.path == "/":
            self.reply(200, PAGE.read_text(encoding="utf-8"), "text/html")
        elif self.path == "/models":
            controls = {name: globals()[name] for name in CONTROLS}
            facts = dict(models=[player.facts for player in self.server.players], controls=controls)
            self.reply(200, json.dumps(facts), "application/json")
        else:
            self.reply(404, f"no {self.path} here")

    def do_POST(self):
        if self.path not in ACTIONS:
            return self.reply(404, f"no {self.path} here")
        self.reply(200, "", "application/x-ndjson")
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            events = ACTIONS[self.path](self.server.players[request["model"]], request)
            while event := self.server.next_event(events):
                self.wfile.write(json.dumps(event, allow_nan=False).encode() + b"\n")
        except BaseException as error:  # a tokenizer's panic is no Exception; where the client has gone, this fails, too
            self.wfile.write(json.dumps(dict(error=in_one_line(error))).encode() + b"\n")

    def log_message(self, format, *args):
        """Nothing: the page says what is wrong."""


def main(dense, compressed=None):
    with Server([load_player(ckpt) for ckpt in (dense, compressed) if ckpt]) as server:
        print(f"open http://{HOST}:{server.server_port} in a browser; Ctrl-C ends it", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run(main)
