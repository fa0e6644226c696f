"""kron_to_gpt.py: what transformers and tiktoken make of the directory that it writes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here

import checkpoint
from kron_to_gpt import default_name, make_tokenizer

TEXTS = ["", " ", "Hello world", "  two  spaces \r\n\ttab .\n\n\n", "don't I'LL it's", "naïve — “quoted” €5½",
         "漢字かな 한국어", "🙂👩‍👩‍👧 e\u0301", "\0\x01\x7f", "<|endoftext|> 12345 x_1=3.14;", "Ġĉ ▁", "\ufeffbom\u2028line"]

WITH_TRANSFORMERS_ALONE = """
import importlib.util, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

assert importlib.util.find_spec("checkpoint") is None and importlib.util.find_spec("data") is None
directory, idx, texts = sys.argv[1], *map(json.loads, sys.argv[2:])
model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
ids = [tokenizer(text).input_ids for text in texts]
with torch.no_grad():
    logits = model(torch.tensor(idx)).logits.tolist()
greedy = model.generate(torch.tensor(idx)[:, :4], max_new_tokens=5, do_sample=False).tolist()
print(json.dumps(dict(logits=logits, ids=ids, texts=[tokenizer.decode(row) for row in ids], greedy=greedy)))
"""


@pytest.fixture
def exported(small_model, workdir):
    """models/small/, of a model with two factors in one of its layers."""
    checkpoint.save("small.pt", small_model)
    said = run_here("kron_to_gpt.py", "small.pt")
    assert said.returncode == 0, said.stderr
    return Path("models/small").resolve()


def contents(directory):
    return {path: path.read_bytes() for path in sorted(Path(directory).rglob("*")) if path.is_file()}


def test_transformers_alone_computes_the_same(exported, small_model, tmp_path_factory):
    idx = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    arguments = [exported, json.dumps(idx.tolist()), json.dumps(TEXTS)]
    command = [sys.executable, "-I", "-c", WITH_TRANSFORMERS_ALONE, *arguments]
    said = subprocess.run(command, cwd=tmp_path_factory.mktemp("elsewhere"), capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    with torch.no_grad():
        np.testing.assert_allclose(found["logits"], small_model(idx).numpy(), rtol=0, atol=1e-4)
    assert found["greedy"] == small_model.generate(idx[:, :4], 5, temperature=0).tolist()
    assert found["ids"] == [list(text.encode()) for text in TEXTS]
    assert found["texts"] == TEXTS


def test_bytes_that_are_no_utf8_decode_as_python_does():
    tokenizer = make_tokenizer(256, 32)
    assert len(tokenizer) == 256 and tokenizer.model_max_length == 32
    broken = [72, 195, 164, 240, 159, 33]
    assert tokenizer.decode(broken) == bytes(broken).decode(errors="replace")


def test_gpt2_tokenizer_is_tiktokens(shared, tmp_path):
    import tiktoken
    from transformers import AutoTokenizer

    make_tokenizer(50257, 1024).save_pretrained(tmp_path)
    tokenizer, encoding = AutoTokenizer.from_pretrained(tmp_path), tiktoken.get_encoding("gpt2")
    words = shared.joinpath("data/lambada/lambada_test.jsonl").read_text(encoding="utf-8")[:20000]
    for text in [*TEXTS, words]:
        ids = encoding.encode(text, allowed_special="all")
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == tokenizer.bos_token_id == 50256


@pytest.mark.parametrize("path, name", [
    ("checkpoints/VL_768_768_1.pt", "VL_768_768_1"),
    ("out/gpt2-82m/ckpt.pt", "gpt2-82m"),
    ("out/gpt2-82m/best.pt", "gpt2-82m"),
    ("here.pt", "here"),
])
def test_directory_is_named_after_the_checkpoint_or_its_folder(path, name):
    assert default_name(path) == name


def test_checkpoint_in_the_current_directory_gives_the_name_of_the_directory(workdir):
    assert default_name("ckpt.pt") == workdir.name


def test_named_directory_is_written_and_replaced(small_model, workdir):
    checkpoint.save("a.pt", small_model)
    assert run_here("kron_to_gpt.py", "a.pt", "some/where").returncode == 0
    first = contents("some/where")
    with torch.no_grad():
        small_model.transformer.wte.weight.mul_(0.5)
    checkpoint.save("a.pt", small_model)
    assert run_here("kron_to_gpt.py", "a.pt", "some/where").returncode == 0
    assert contents("some/where").keys() == first.keys() and contents("some/where") != first
    assert os.listdir("some") == ["where"]


@pytest.mark.parametrize("tolerance", ["0", "-1", "1e-30"])
def test_an_export_that_differs_too_much_leaves_everything_as_it_was(tolerance, exported, small_model, workdir):
    before = contents(workdir)
    for target in ("models/small", "models/other"):
        said = run_here("kron_to_gpt.py", "small.pt", target, f"--tolerance={tolerance}")
        assert said.returncode == 1
        assert "nothing was written" in said.stderr and said.stderr.count("\n") == 1
    assert contents(workdir) == before and os.listdir("models") == ["small"]


@pytest.mark.parametrize("args, message", [
    (["small.pt", "notes"], "notes exists and is no Hugging Face model"),
    (["small.pt", "small.pt"], "small.pt exists and is no Hugging Face model"),
    (["nothing.pt"], "no checkpoint nothing.pt"),
    (["notes"], "directory notes holds no model"),
    (["notes/todo.txt"], "notes/todo.txt"),
    (["odd.pt"], "no tokenizer has the model's vocabulary of 300"),
    ([], "missing argument; usage: kron_to_gpt.py ckpt [out_dir]"),
])
def test_wrong_arguments_get_one_line_and_write_nothing(args, message, small_model, workdir):
    checkpoint.save("small.pt", small_model)
    odd = dict(small_model.config.as_plain_types(), vocab_size=300)
    checkpoint.save("odd.pt", type(small_model)(type(small_model.config)(**odd)))
    workdir.joinpath("notes").mkdir()
    workdir.joinpath("notes/todo.txt").write_text("write")
    before = contents(workdir)
    said = run_here("kron_to_gpt.py", *args)
    assert said.returncode == 2
    assert message in said.stderr and said.stderr.count("\n") == 1
    assert contents(workdir) == before
