"""perplexity.py beside a plain loop over windows with transformers' GPT-2."""
import json
import math
import shutil
import socket
import threading
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiktoken
import torch
from conftest import run_here, succeed
from test_bad_input import write_byte_level_tokenizer
from test_data import config_of, write_dataset
from transformers import GPT2Config, GPT2LMHeadModel

import perplexity
from kronygpt import hub

CONTEXT = 32  # of the model in gpt2_dir


def sliding_windows(model, ids, context, stride):
    """Sum of the losses and number of tokens scored, by the recipe of transformers' documentation."""
    total, scored, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = torch.tensor([ids[begin:end]])
        labels = window.clone()
        labels[:, :done - begin] = -100  # an earlier window has scored them
        n = (labels[:, 1:] != -100).sum().item()  # the model shifts the labels by one
        if n:
            with torch.no_grad():
                total += model(window, labels=labels).loss.item() * n
        scored, done = scored + n, end
        if end == len(ids):
            return total, scored


@pytest.fixture(scope="module")
def dense(gpt2_dir):
    return GPT2LMHeadModel.from_pretrained(gpt2_dir).eval()


def measure(ckpt, *args):
    """The results by data set."""
    succeed("perplexity.py", ckpt, *args, "--json_out=results.json")
    return json.loads(Path("results.json").read_text(encoding="utf-8"))


def check(result, model, ids, stride=CONTEXT):
    total, scored = sliding_windows(model, ids, CONTEXT, stride)
    assert result["tokens_scored"] == scored
    assert result["loss"] == pytest.approx(total / scored, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / scored), rel=1e-5)


def some_bytes(n):
    """An ASCII text of n bytes."""
    return bytes(np.random.default_rng(n).integers(32, 127, n).tolist())


@pytest.mark.parametrize("stride", [32, 16, 5, 1])
@pytest.mark.parametrize("n", [2, 20, 32, 33, 3 * 32, 3 * 32 + 1, 200])
def test_perplexity_is_that_of_a_plain_loop(n, stride, gpt2_dir, dense, workdir):
    workdir.joinpath("text.txt").write_bytes(some_bytes(n))
    result = measure(gpt2_dir, "text.txt", f"--stride={stride}", "--batch_size=3")["text.txt"]
    check(result, dense, list(some_bytes(n)), stride)
    if stride < CONTEXT:
        assert result["tokens_scored"] == n - 1  # each token once, but for the first


def test_printed_line_says_what_the_file_says(gpt2_dir, workdir):
    workdir.joinpath("text.txt").write_text("Ein naïver Text\n" * 20)
    said = run_here("perplexity.py", gpt2_dir, "text.txt", "--json_out=results.json")
    result = json.loads(Path("results.json").read_text(encoding="utf-8"))["text.txt"]
    words = said.stdout.splitlines()[-1].split()
    assert words[:3] == ["text.txt", f"{result['perplexity']:.3f}", f"{result['loss']:.4f}"]
    assert words[3] == str(result["tokens_scored"])
    assert float(words[4]) == pytest.approx(result["loss"] / math.log(2), abs=1e-4)  # a token is a byte


def test_owt_scores_so_many_batches(gpt2_dir, dense, workdir):
    ids = list(some_bytes(400))
    write_dataset("openwebtext", b"", ids)
    check(measure(gpt2_dir, "owt", 2, "--batch_size=3")["owt"], dense, ids[:2 * 3 * CONTEXT])
    check(measure(gpt2_dir, "owt")["owt"], dense, ids)  # 200 batches are more than there is


def test_all_forms_of_a_model_score_alike(gpt2_dir, workdir):
    workdir.joinpath("text.txt").write_bytes(some_bytes(200))
    options = [f"--init_from={gpt2_dir}", "--out=out/small/ckpt.pt"]
    succeed("kron_decompose.py", 32, 64, 2, *options)
    succeed("kron_to_gpt.py", "out/small/ckpt.pt")
    exported = GPT2LMHeadModel.from_pretrained("models/small").eval()
    for form in ("out/small/ckpt.pt", "out/small", "models/small", "small"):
        check(measure(form, "text.txt")["text.txt"], exported, list(some_bytes(200)))


def write_wikitext(directory, rows):
    """A copy of WikiText in the hub's layout, with other rows: {config: its test split's}."""
    from datasets import Dataset

    listed = "---\nconfigs:\n"
    for config, texts in rows.items():
        Path(directory, config).mkdir(parents=True)
        Dataset.from_dict(dict(text=texts)).to_parquet(f"{directory}/{config}/test-00000-of-00001.parquet")
        listed += f"- config_name: {config}\n  data_files:\n  - split: test\n    path: {config}/test-*\n"
    Path(directory, "README.md").write_text(listed + "---\n", encoding="utf-8")


def test_the_three_published_sets_are_scored_without_a_name(gpt2_dir, dense, workdir):
    texts = {name: ["", f" = {name} = \n", f" The text of {name} . \n" * 3] for name in ("wiki103", "wiki2", "lambada")}
    write_wikitext("wikitext", {"wikitext-103-v1": texts["wiki103"], "wikitext-2-v1": texts["wiki2"]})
    workdir.joinpath("lambada.jsonl").write_text("".join(json.dumps(dict(text=row)) + "\n" for row in texts["lambada"]))
    results = measure(gpt2_dir, "--wikitext=wikitext", "--lambada=lambada.jsonl")
    assert list(results) == ["wiki103", "wiki2", "lambada"]
    for name, result in results.items():
        check(result, dense, list("\n\n".join(texts[name]).encode()))


@pytest.mark.parametrize("name, n_tokens", [("wiki103", 286_657), ("wiki2", 297_300), ("lambada", 440_534)])
def test_published_sets_have_their_number_of_gpt2_tokens(name, n_tokens, shared, monkeypatch):
    monkeypatch.setattr(perplexity, "wikitext", str(shared / "data/wikitext"))
    monkeypatch.setattr(perplexity, "lambada", str(shared / "data/lambada/lambada_test.jsonl"))
    tokens, n_bytes = perplexity.load_text_tokens(name, config_of(50257))
    text = tiktoken.get_encoding("gpt2").decode(tokens)
    assert len(tokens) == n_tokens and len(text.encode()) == n_bytes
    assert text == "\n\n".join(perplexity.load_rows(name))


def test_bits_per_byte_spreads_the_loss_over_bytes(shared, workdir):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=CONTEXT))
    model.save_pretrained("wide")
    text = "The café’s 3 tokens — of 50,257 — are longer than bytes. 🙂\n" * 4
    workdir.joinpath("text.txt").write_text(text)
    result = measure("wide", "text.txt")["text.txt"]
    ids = tiktoken.get_encoding("gpt2").encode(text)
    check(result, model.eval(), ids)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * len(ids) / len(text.encode()) / math.log(2))


@pytest.mark.parametrize("script, args, words", [
    ("perplexity.py", ["nothing", "wiki103"], "no file or directory nothing, nor models/nothing"),
    ("perplexity.py", ["{}", "wiki103"], "Couldn't reach 'Salesforce/wikitext' on the Hub"),
    ("prepare_owt.py", ["--tokenizer={}", "--out=mine"], "Couldn't reach 'Skylion007/openwebtext' on the Hub")])
def test_a_hub_that_does_not_answer_is_tried_once_and_quietly(script, args, words, gpt2_dir, workdir, run_script):
    """Its libraries retry for 26 s, and print two lines each time."""
    write_byte_level_tokenizer("model")
    shutil.copytree(gpt2_dir, "model", dirs_exist_ok=True)
    offline = dict(HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:1", HF_HOME=str(workdir / "hf"))
    said = run_script(script, *(arg.format("model") for arg in args), cwd=workdir, env=offline)
    assert said.returncode in (1, 2) and words in said.stderr and said.stderr.count("\n") == 1, said.stderr
    assert not Path("data").exists()


@pytest.mark.parametrize("answer, is_offline", [("200 OK", False), ("404 Not found", False), ("503 Busy", True), ("", True)])
def test_a_hub_that_answers_is_used_and_one_that_keeps_silent_is_not_waited_for(answer, is_offline, monkeypatch):
    def serve():
        with server.accept()[0] as connection:
            connection.recv(10_000)
            connection.sendall(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

    with socket.create_server(("127.0.0.1", 0)) as server:
        if answer:
            threading.Thread(target=serve, daemon=True).start()
        else:
            monkeypatch.setattr(hub, "HUB_SECONDS", 0.2)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        start = time.monotonic()
        hub.reach_hub()
        assert huggingface_hub.constants.HF_HUB_OFFLINE == is_offline and time.monotonic() - start < 4
