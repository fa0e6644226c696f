"""bench.py: the commands run at small sizes, and their tables are complete."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import run_here
from transformers import GPT2Config, GPT2LMHeadModel

from experiments import bench
from kronygpt.configurator import UserError

TINY = ("--n_layer=2", "--n_embd=64", "--n_head=1", "--vocab_size=300", "--block_size=100", "--repeats=1", "--device=cpu")
MEASUREMENTS = ["training step", "forward", "generation 1 × 64", "generation 1 × 100", "generation 8 × 64",
                "generation 8 × 100", "file"]  # and peak memory, on Linux and GPUs


def test_models_are_measured_against_the_dense_one(workdir):
    done = run_here("experiments/bench.py", *TINY, "--new_tokens=4", "--shapes=32,64,2", "--out_dir=here")
    assert done.returncode == 0, done.stderr
    names = ["dense", "ours (32, 64, 2)", "torch.kron (32, 64, 2)", "transformers dense", "whole logits (32, 64, 2)"]
    results = json.loads(Path("here/results.json").read_text())
    assert list(results) == names
    for result in results.values():
        assert set(MEASUREMENTS) <= result["measured"].keys()
        assert all(math.isfinite(value) and value > 0 for value in result["faster_than_dense"].values())
    assert set(results["dense"]["faster_than_dense"].values()) == {1}
    assert results["ours (32, 64, 2)"]["faster_than_dense"]["file"] > 1
    assert results["dense"]["mfu"] > 0 and results["transformers dense"]["mfu"] == 0
    table = Path("here/table.md").read_text()
    assert re.findall(r"^\| ([^|]+?) +\|", table, re.M) == ["model", *names]
    assert table in done.stdout
    assert Path("here/ratios.png").stat().st_size > 0


def test_a_fourth_number_factors_attention(monkeypatch):
    for name, value in dict(n_embd=64, n_head=1, vocab_size=300, block_size=100).items():
        monkeypatch.setattr(bench, name, value)
    matrices = dict(bench.make_candidates((64, 1, 5, 7), is_first=False)["ours (64, 1, 5, 7)"].model.matrices())
    assert {name.split(".", 3)[3]: tuple(matrix.A.shape) for name, matrix in matrices.items()} == {
        "attn.c_attn": (7, 64, 1), "attn.c_proj": (7, 64, 1), "mlp.c_fc": (5, 64, 1), "mlp.c_proj": (5, 1, 64)}


def test_a_loop_over_many_factors_is_left_out(monkeypatch):
    """It would keep as many whole matrices: 50 GB for GPT-2's MLPs at (768, 1, 153)."""
    for name, value in dict(n_embd=64, n_head=1, vocab_size=300, block_size=100).items():
        monkeypatch.setattr(bench, name, value)
    for shape, has_loop in (((64, 1, 16), True), ((64, 1, 17), False), ((64, 64, 1, 17), False)):
        assert (f"torch.kron {shape}" in bench.make_candidates(shape, is_first=False)) == has_loop


def test_every_order_of_contraction_of_a_layer_is_timed(workdir):
    done = run_here("experiments/bench.py", "layer", *TINY, "--shapes=32,64,2", "--layer_shapes=64,256,1", "--layer_tokens=1 64")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"\((.*?)\) +(c_fc|c_proj) +(\d+) +(forward|backward)(.*)  ([ABW]) (\d+\.\d+)", done.stdout)
    assert [row[:4] for row in rows] == [(shape, matrix, tokens, what) for shape in ("32, 64, 2", "64, 256, 1")
                                         for matrix in ("c_fc", "c_proj") for tokens in ("1", "64")
                                         for what in ("forward", "backward")]
    assert all(float(over) >= 1 for *_, over in rows)
    for *_, cells, chosen, _ in rows:
        assert cells.split()["ABW".index(chosen)].endswith("ms")
    assert len(re.findall(r"ward: \d of 8 choices", done.stdout)) == 2


@pytest.mark.parametrize("args, said", [
    (["--shapes=768,768"], "expected shapes such as 768,768,1 256,64,10, not 768,768"),
    (["--shapes=50,768,1"], "dim_1=50 does not divide the 768 rows of mlp.c_fc"),
    (["layer", "--layer_tokens=0"], "expected numbers such as 1 64, not 0"),
    (["--repeats=0"], "--repeats is at least 1 and at most 1000000000, not 0"),
    (["--dtype=int8"], "--dtype is float32, bfloat16 or float16, not int8"),
    (["--new_tokens=64"], "--new_tokens is below 64, not 64"),
    (["score", "book.txt"], "bench.py takes models, layer, tokenize DOCUMENTS.jsonl, or score TEXT DENSE_MODEL MODEL"),
    (["--shapes=768,768,1 50,768,1"], "dim_1=50 does not divide"), (["--n_head=5"], "n_head=5 does not divide"),
    (["layer", "--layer_shapes=7,1,1"], "dim_1=7 does not divide"),
    (["tokenize", "no.jsonl"], "no documents in no.jsonl"), (["tokenize", "empty.jsonl"], "no documents in empty.jsonl"),
    (["tokenize", "."], "no documents in ."), (["tokenize", "notext.jsonl"], "prepare_owt.py failed: error: ")])
def test_bad_options_are_one_line(workdir, args, said):
    Path("empty.jsonl").touch()
    Path("notext.jsonl").write_text('{"a": "b"}\n' * 3)
    done = run_here("experiments/bench.py", *args)
    assert done.returncode in (1, 2) and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    assert done.stdout.count("\n") <= 1, "something was measured first"  # the options that were changed
    assert sorted(path.name for path in workdir.iterdir()) == ["empty.jsonl", "notext.jsonl"]


@pytest.fixture
def scored(workdir, shared, monkeypatch):
    """bench_score, with perplexity.py in this process, for a GPT-2 of 50,257 tokens and a context of 64."""
    def run_script(script, *args):
        done = run_here(script, *args)
        if done.returncode:
            raise UserError(f"{script} failed: {done.stderr.strip()}", status=1)

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=64)).save_pretrained("dense")
    monkeypatch.setattr(bench, "run_script", run_script)
    monkeypatch.setattr(bench, "repeats", 1)
    return bench.bench_score


@pytest.mark.parametrize("text", ["Two short words.", "Two short words. " * 40])
def test_scoring_is_compared_on_texts_shorter_and_longer_than_the_context(text, scored, capsys):
    Path("book.txt").write_text(text)
    scored("book.txt", "dense", "dense")
    assert len(re.findall(r"tokens/s, [\d.]+ times the loop", capsys.readouterr().out)) == 3


@pytest.mark.parametrize("content, dense, ckpt, said", [
    (b"", "dense", "dense", "book.txt"), (b"one", "dense", "dense", "1 tokens"), (b"caf\xe9", "dense", "dense", "UTF-8"),
    (None, "dense", "dense", "book.txt"), (b"some words", "nothing", "dense", "nothing"),
    (b"some words", "dense", "nothing.pt", "nothing.pt"), (b"some words", "ckpt.pt", "dense", "ckpt.pt cannot be read")])
def test_odd_texts_and_models_are_one_line(content, dense, ckpt, said, scored):
    if content is not None:
        Path("book.txt").write_bytes(content)
    Path("ckpt.pt").touch()
    with pytest.raises(UserError) as caught:
        scored("book.txt", dense, ckpt)
    assert said in str(caught.value) and "\n" not in str(caught.value).strip() and "Traceback" not in str(caught.value)
