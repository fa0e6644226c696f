"""A web page to play with one or two models: the same prompt, tokens as they come, speed, size, and the loss on a text.

    python play.py out/demo/base/best.pt out/demo/small
    python play.py gpt2 checkpoints/best_82M.pt --port=8001 --temperature=1

A model is a .pt file, a Hugging Face directory, a name under models/ or a hub name: a dense one first, then one made of it.
The page is served to this machine alone, and loads nothing from elsewhere. The models take turns, one token each, in the
order of the requests: tokens per second are those of a model that has the machine for itself. Ctrl-C ends it.
"""
import codecs
import json
import math
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from kronygpt.configurator import UserError, check_range, checked_value, option_types, run

port = 8017  # of the page at 127.0.0.1; 0 takes any that is free
prompt = "The function returns"  # what the page begins with, as do the next four options
max_new_tokens = 200  # tokens to add
temperature = 0.8  # divides the logits; 0 takes the most likely token
top_k = 200  # sample among the N most likely tokens; 0 for all
seed = 1337  # of the sampling
tokenizer: str | None = None  # directory of the tokenizer; default: the model's
device = ""  # cuda, cpu, ...; default: CUDA if available, else the CPU
dtype = "float32"  # bfloat16 or float16, by autocast

MAY_BE_EMPTY = ("prompt",)
CONTROLS = ("prompt", "max_new_tokens", "temperature", "top_k", "seed")
HOST = "127.0.0.1"
LARGEST_REQUEST = 2**18  # bytes
PATIENCE = 30  # seconds for a client that neither reads nor writes
PAGE = Path(__file__).parent / "kronygpt" / "play.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class Player(NamedTuple):
    """A KronyGPT in eval mode on its device, its Tokenizer, and what the page says of it."""

    model: object
    tokenizer: object
    facts: dict


def load_player(ckpt):
    from kronygpt import checkpoint
    from kronygpt.device import pick_device
    from kronygpt.tokenizer import open_tokenizer

    model, _ = checkpoint.load(ckpt)
    text_tokenizer = open_tokenizer(model.config, tokenizer)
    model.to(pick_device(device)).eval()
    facts = dict(name=ckpt, kind="dense" if all(matrix.is_dense for _, _, matrix in model.matrices()) else "compressed",
                 parameters=model.count_parameters()["total"], context=model.config.block_size,
                 bytes=sum(p.numel() * p.element_size() for p in model.parameters()))
    return Player(model, text_tokenizer, facts)


def generate(player, request):
    """Yield {"text", "tokens", "of", "tokens_per_second"} after each new token. Text comes as soon as its bytes are UTF-8;
    the speed is that after the first token, which reads the prompt."""
    import numpy as np
    import torch

    from kronygpt.data import check_tokens
    from kronygpt.tokenizer import TOKEN_TYPE

    def to_bytes(tokens):  # an unknown tokenizer has no bytes, and writes numbers
        return player.tokenizer.decode_bytes(tokens) or player.tokenizer.decode(tokens).encode()

    types = option_types(globals())
    options = {name: checked_value(name, request.get(name, globals()[name]), types[name]) for name in CONTROLS}
    tokens = player.tokenizer.encode_prompt(options["prompt"])
    if not tokens:
        raise UserError("the prompt is empty, and the model's tokenizer has no end-of-text token: type one")
    check_tokens(np.array(tokens, TOKEN_TYPE), player.model.config.vocab_size)
    idx = torch.tensor([tokens], device=player.model.lm_head.weight.device)
    n, last, seconds, to_text = options["max_new_tokens"], tokens[-1], 0.0, codecs.getincrementaldecoder("utf-8")("replace")
    start = time.perf_counter()
    for done, token in enumerate(player.model.generate(idx, n, options["temperature"], options["top_k"] or None,
                                                     options["seed"]), 1):
        token = token.item()
        seconds += time.perf_counter() - start if done > 1 else 0
        new = to_bytes([last, token])[len(to_bytes([last])):]  # some tokenizers write a token by the one before it
        yield dict(text=to_text.decode(new, final=done == n), tokens=done, of=n,
                   tokens_per_second=(done - 1) / seconds if seconds else None)
        last, start = token, time.perf_counter()


def score(player, request):
    """Yield {"loss": nats per token so far, "tokens", "of"} after each window of the text. Windows do not overlap, and the
    first token of each is not scored, as in perplexity.py."""
    import torch

    from kronygpt.data import check_tokens

    tokens = player.tokenizer.encode(checked_value("text", request.get("text"), str))
    check_tokens(tokens, player.model.config.vocab_size)
    tokens = torch.from_numpy(tokens.astype("int64")).to(player.model.lm_head.weight.device)
    windows = [window for window in tokens[None].split(player.model.config.block_size, dim=1) if window.shape[1] > 1]
    if not windows:
        raise UserError("a token is scored by those before it: give a text of two tokens or more")
    total, n, n_all = 0.0, 0, sum(window.shape[1] - 1 for window in windows)
    for window in windows:
        idx, targets = window[:, :-1], window[:, 1:]
        with torch.no_grad():
            total += player.model(idx, targets).item() * targets.numel()
        n += targets.numel()
        if not math.isfinite(total):
            raise UserError("the loss is not finite")
        yield dict(loss=total / n, tokens=n, of=n_all)


def in_one_line(error):
    return " ".join(str(error).removeprefix("--").split())  # the page has no options


ACTIONS = {"/generate": generate, "/loss": score}


class Server(ThreadingHTTPServer):
    """Serves the page and its players. One thread runs the models, one token or window at a time, so that requests share the
    machine in turns; the others wait for it and talk to the clients."""

    def __init__(self, players):
        from kronygpt.device import autocast_to, pick_device

        self.players, self.closed = players, False
        self.autocast = autocast_to(pick_device(device), dtype)
        self.worker = ThreadPoolExecutor(max_workers=1)
        super().__init__((HOST, port), Handler)

    def next_event(self, events):
        """The next of a request's events, or None after the last."""
        def step():
            with self.autocast:
                return next(events, None)

        return self.worker.submit(step).result()

    def server_close(self):
        self.closed = True
        super().server_close()
        self.worker.shutdown(cancel_futures=True)

    def handle_error(self, request, client_address):
        if not self.closed and not isinstance(sys.exc_info()[1], OSError):  # else the client has gone
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET / and /models, POST /generate and /loss; the answer to a POST is a line of JSON for each event."""

    timeout = PATIENCE

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
        self.end_headers()
        self.wfile.write(content.encode())

    def do_GET(self):
        if self.path == "/":
            self.reply(200, PAGE.read_text(encoding="utf-8"), "text/html")
        elif self.path == "/models":
            controls = {name: globals()[name] for name in CONTROLS}
            facts = dict(models=[player.facts for player in self.server.players], controls=controls, largest=LARGEST_REQUEST)
            self.reply(200, json.dumps(facts), "application/json")
        else:
            self.reply(404, f"no {self.path} here")

    def do_POST(self):
        if self.path not in ACTIONS:
            return self.reply(404, f"no {self.path} here")
        try:
            player, request = self.read_request()
            events = ACTIONS[self.path](player, request)
            event = self.server.next_event(events)
        except UserError as error:
            return self.reply(400, in_one_line(error))
        self.reply(200, "", "application/x-ndjson")
        while event and not self.server.closed:
            self.wfile.write(json.dumps(event).encode() + b"\n")
            try:
                event = self.server.next_event(events)
            except UserError as error:
                event, events = dict(error=in_one_line(error)), iter(())

    def read_request(self):
        """The Player and the options that a request names."""
        try:
            length = int(self.headers["Content-Length"])
            if length > LARGEST_REQUEST:
                while length > 0 and self.rfile.read(min(length, LARGEST_REQUEST)):  # a client reads after it has sent
                    length -= LARGEST_REQUEST
                raise UserError(f"a text of more than {LARGEST_REQUEST // 2**10} KiB is too long for the page: "
                                "perplexity.py takes it as a file")
            request = json.loads(self.rfile.read(max(0, length)))
            return self.server.players[request["model"]], dict(request)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise UserError(f"this is no request of the page: {type(error).__name__}: {error}") from None

    def log_message(self, format, *args):
        """Nothing: the page says what is wrong."""


def main(dense, compressed=None):

    check_range(globals(), "port", at_least=0, at_most=2**16 - 1)
    players = [load_player(ckpt) for ckpt in (dense, compressed) if ckpt]
    try:
        server = Server(players)
    except OSError as error:
        raise UserError(f"cannot serve at port {port} ({error.strerror}): --port=N names another", status=1) from None
    with server:
        print(f"open http://{HOST}:{server.server_port} in a browser; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    run(main)
