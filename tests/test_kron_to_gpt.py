"""kron_to_gpt.py: what transformers and tiktoken make of the directory that it writes."""
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import continuation, random_tokens, run_here, succeed
from huggingface_hub import HfApi
from safetensors.torch import load_file

from kron_to_gpt import default_directory
from kronygpt import checkpoint
from kronygpt.export import write_tokenizer
from kronygpt.tokenizer import BytesTokenizer, GPT2Tokenizer
from model import KronyGPT, KronyGPTConfig

TEXTS = ["", " ", "Hello world", "  two  spaces \r\n\ttab .\n\n\n", "don't I'LL it's", "naïve — “quoted” €5½",
         "漢字かな 한국어", "🙂👩‍👩‍👧 e\u0301", "\0\x01\x7f", "<|endoftext|> 12345 x_1=3.14;", "Ġĉ ▁", "\ufeffbom\u2028line"]

@pytest.fixture
def exported(small_model, workdir):
    """models/small/, of a model with two factors in one of its layers."""
    checkpoint.save("small.pt", small_model)
    said = run_here("kron_to_gpt.py", "small.pt")
    assert said.returncode == 0, said.stderr
    return Path("models/small").resolve()


def contents(directory):
    return {path: path.read_bytes() for path in sorted(Path(directory).rglob("*")) if path.is_file()}


def test_transformers_computes_the_same(exported, small_model):
    """With no code of ours: nothing in the directory names any, as another test sees."""
    from transformers import AutoModelForCausalLM

    idx = random_tokens(2, 32)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported).eval(), load_tokenizer(exported)
    assert type(model).__module__.startswith("transformers.models.gpt2.")
    with torch.no_grad():
        torch.testing.assert_close(model(idx).logits, small_model(idx), rtol=0, atol=1e-4)
    greedy = model.generate(idx[:, :4], max_new_tokens=5, do_sample=False)
    assert torch.equal(greedy, continuation(small_model, idx[:, :4], 5, temperature=0))
    for text in TEXTS:
        assert tokenizer(text).input_ids == list(text.encode()) and tokenizer.decode(list(text.encode())) == text


def test_what_the_tokenizer_returns_is_what_the_model_takes(exported, small_model):
    """transformers 4 made token_type_ids unasked, and GPT-2 adds their embedding. Shorter texts are padded on demand."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported).eval(), load_tokenizer(exported)
    texts, inputs = ["a longer text", "short"], tokenizer(["a longer text", "short"], return_tensors="pt", padding=True)
    assert set(inputs) == {"input_ids", "attention_mask"} and inputs["attention_mask"].sum(1).tolist() == [13, 5]
    with torch.no_grad():
        for text, row in zip(texts, model(**inputs).logits):
            expected = small_model(torch.tensor([list(text.encode())]))[0]
            torch.testing.assert_close(row[:len(text)], expected, rtol=0, atol=1e-4)
    settings = json.loads((exported / "tokenizer_config.json").read_text())  # transformers 4 knows the class
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and model.generation_config.eos_token_id is None


def test_the_tokenizer_of_bytes(tmp_path):
    write_tokenizer(tmp_path, BytesTokenizer(), 32)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 256 and tokenizer.model_max_length == 32
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 10
    assert tokenizer("Ċ\n").input_ids == [0xC4, 0x8A, 10]  # the letter that stands for a line end in the vocabulary
    broken = [72, 195, 164, 240, 159, 33]
    assert tokenizer.decode(broken) == bytes(broken).decode(errors="replace")


def load_tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def test_gpt2_tokenizer_is_tiktokens(shared, tmp_path):
    import tiktoken

    write_tokenizer(tmp_path, GPT2Tokenizer(), 1024)
    tokenizer, encoding = load_tokenizer(tmp_path), tiktoken.get_encoding("gpt2")
    words = shared.joinpath("data/lambada/lambada_test.jsonl").read_text(encoding="utf-8")[:20000]
    for text in [*TEXTS, words]:
        ids = encoding.encode(text, allowed_special="all")
        assert tokenizer(text).input_ids == ids and tokenizer.decode(ids) == text
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == tokenizer.bos_token_id == 50256
    published = {hashlib.sha256(path.read_bytes()).hexdigest() for path in shared.joinpath("data/tiktoken_cache").iterdir()}
    assert {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("vocab.json", "merges.txt")} <= published


# what convert_hf_to_gguf.py of llama.cpp has names for, in a block and around the blocks
GGUF_BLOCK = {f"{name}.{kind}" for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
              for kind in ("weight", "bias")}
GGUF_OTHERS = {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}


@pytest.mark.parametrize("n_inner", [None, 128])
def test_what_the_converter_to_gguf_reads(n_inner, small_model, workdir):
    """It reads these fields, and `n_ctx` for the context where transformers reads n_positions. It does not read n_inner."""
    sizes = dict(block_size=32, vocab_size=256, n_layer=2, n_head=1, n_embd=64)
    checkpoint.save("small.pt", KronyGPT(KronyGPTConfig(**sizes, n_inner=n_inner)) if n_inner else small_model)
    assert run_here("kron_to_gpt.py", "small.pt", "made").returncode == 0
    config = json.loads(Path("made/config.json").read_text(encoding="utf-8"))
    wanted = dict(architectures=["GPT2LMHeadModel"], n_layer=2, n_ctx=32, n_embd=64, n_head=1, layer_norm_epsilon=1e-5,
                  vocab_size=256, n_inner=n_inner)
    assert {name: config[name] for name in wanted} == wanted
    shapes = {name: p.shape for name, p in load_file("made/model.safetensors").items()}
    blocks = {f"h.{layer}.{name}" for layer in range(2) for name in GGUF_BLOCK}
    assert shapes.keys() == {f"transformer.{name}" for name in blocks | GGUF_OTHERS}
    for layer in range(2):  # [in, out], which it transposes
        assert shapes[f"transformer.h.{layer}.mlp.c_fc.weight"] == (64, n_inner or 256)
        assert shapes[f"transformer.h.{layer}.mlp.c_proj.weight"] == (n_inner or 256, 64)
        assert shapes[f"transformer.h.{layer}.attn.c_attn.weight"] == (64, 192)


def test_an_unknown_vocabulary_is_exported_without_a_tokenizer(workdir):
    checkpoint.save("odd.pt", KronyGPT(KronyGPTConfig(block_size=32, vocab_size=300, n_layer=1, n_head=1, n_embd=64)))
    said = run_here("kron_to_gpt.py", "odd.pt")
    assert said.returncode == 0, said.stderr
    assert "no tokenizer is known for the vocabulary of 300" in said.stdout and "only the weights are" in said.stdout
    assert checkpoint.load("models/odd")[0].config.vocab_size == 300 and not list(Path("models/odd").glob("*token*"))


def test_without_a_network_the_weights_are_exported(workdir, monkeypatch):
    def get_encoding(name):
        raise OSError("no network")  # without a number, as those of HTTP clients

    monkeypatch.setattr("tiktoken.get_encoding", get_encoding)
    checkpoint.save("a.pt", KronyGPT(KronyGPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=1, n_embd=8)))
    said = succeed("kron_to_gpt.py", "a.pt", "made")
    assert "only the weights are written: GPT-2's tokenizer could not be downloaded (OSError)" in said.stdout
    assert Path("made/model.safetensors").exists() and not Path("made/tokenizer.json").exists()


@pytest.mark.parametrize("path, name", [
    ("checkpoints/VL_768_768_1.pt", "VL_768_768_1"),
    ("out/gpt2-82m/ckpt.pt", "gpt2-82m"),
    ("out/gpt2-82m/best.pt", "gpt2-82m"),
])
def test_directory_is_named_after_the_checkpoint_or_its_folder(path, name):
    assert default_directory(path, Path("models")) == Path("models", name)


def test_a_directory_is_replaced_as_a_whole_and_files_of_others_stay(small_model, workdir):
    checkpoint.save("a.pt", small_model)
    for n in range(2):
        assert run_here("kron_to_gpt.py", "a.pt", "made").returncode == 0
        if n == 0:
            for name in ("notes.md", "pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                         "special_tokens_map.json", "model.safetensors", "adapter_model.safetensors", "sub/data.csv"):
                Path("made", name).parent.mkdir(exist_ok=True)
                Path("made", name).write_text("old", encoding="utf-8")
    assert {str(path.relative_to("made")) for path in Path("made").rglob("*")} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "notes.md", "adapter_model.safetensors", "sub", "sub/data.csv"}
    assert Path("made/sub/data.csv").read_text(encoding="utf-8") == "old" and sorted(os.listdir()) == ["a.pt", "made"]
    assert checkpoint.load("made")[0].config.n_layer == 2


def test_an_export_that_differs_too_much_leaves_everything_as_it_was(exported, workdir):
    before = contents(workdir)
    for target in ("models/small", "models/other"):
        said = run_here("kron_to_gpt.py", "small.pt", target, "--tolerance=0")
        assert said.returncode == 1
        assert "nothing was written" in said.stderr and said.stderr.count("\n") == 1
    assert contents(workdir) == before and os.listdir("models") == ["small"]


@pytest.mark.parametrize("args, message", [
    (["small.pt", "notes"], "notes exists and holds no GPT-2"),
    (["small.pt", "small.pt"], "small.pt is a file"),
    (["small.pt", "."], "exists and holds no GPT-2"),
    (["notes"], "notes/config.json"),
    (["small.pt", "--tokenizer=notes"], "notes has no tokenizer"),
    ([], "missing a required argument"),
])
def test_wrong_arguments_get_one_line_and_write_nothing(args, message, small_model, workdir):
    checkpoint.save("small.pt", small_model)
    workdir.joinpath("notes").mkdir()
    workdir.joinpath("notes/todo.txt").write_text("write")
    before = contents(workdir)
    said = run_here("kron_to_gpt.py", *args)
    assert said.returncode == 2
    assert message in said.stderr and said.stderr.count("\n") == 1
    assert contents(workdir) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_files_have_the_mode_that_the_user_gives_new_files(small_model, workdir):
    checkpoint.save("small.pt", small_model)
    before = os.umask(0o002)
    try:
        assert run_here("kron_to_gpt.py", "small.pt", "made").returncode == 0
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in Path("made").iterdir()} == {0o664}


# --push

@pytest.mark.parametrize("compressed", [True, False])
def test_the_complete_directory_is_pushed(compressed, small_model, workdir, monkeypatch):
    received = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, exist_ok: f"https://hub/{repo_id}")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, repo_id, folder_path: received.update({
        repo_id: {path.name: data for path, data in contents(folder_path).items()}}))
    checkpoint.save("small.pt", small_model)
    said = run_here("kron_to_gpt.py", "small.pt", "made", "--push=org/small", f"--compressed={compressed}")
    assert said.returncode == 0 and said.stdout.endswith("\nuploaded to https://hub/org/small\n"), said.stderr
    assert received == {"org/small": {path.name: data for path, data in contents("made").items()}}
    card = received["org/small"].get("README.md", b"")
    assert (b'from_pretrained("org/small", trust_remote_code=True)' in card) == compressed


def test_an_upload_that_cannot_be_is_said_and_the_directory_stays(small_model, workdir):
    checkpoint.save("small.pt", small_model)
    said = run_here("kron_to_gpt.py", "small.pt", "made", "--push=org/small")
    assert said.returncode == 1 and said.stderr.count("\n") == 1 and "offline mode is enabled" in said.stderr
    assert "wrote made/" in said.stdout and Path("made/model.safetensors").exists()
