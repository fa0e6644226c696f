"""Conversions of models of random shapes, and every script over damaged files, which end in one line."""
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_here, to_gpt2
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_bad_input import is_one_line_with, snapshot, write_byte_level_tokenizer
from test_train import write_dataset

from kronygpt import checkpoint
from model import KronyGPT, KronyGPTConfig, mlp_shapes


def random_shape(draw, m, n):
    dim_1, dim_2 = (draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])) for size in (m, n))
    return dim_1, dim_2, draw(st.integers(1, 3))


def random_model(draw):
    """A small KronyGPT with any shapes of its matrices, and random weights everywhere."""
    n_head, head_dim, n_layer = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = dict(block_size=draw(st.integers(1, 5)), vocab_size=draw(st.integers(1, 9)), n_layer=n_layer, n_head=n_head,
                 n_embd=n_head * head_dim, n_inner=draw(st.sampled_from([None, 1, 6])))
    named = {name: size for name, size in KronyGPTConfig(**sizes).sizes(0).items() if draw(st.booleans())}
    shapes = {name: [random_shape(draw, m, n) for _ in range(n_layer)] for name, (m, n) in named.items()}
    torch.manual_seed(draw(st.integers(0, 99)))
    model = KronyGPT(KronyGPTConfig(**sizes, shapes=shapes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def older_layout(state_dict):
    """The factors of the MLPs by themselves, and the prefix that DDP leaves."""
    older = {}
    for name, p in state_dict.items():
        if ".mlp." in name and name.endswith(("_0", "_1")):
            older |= {f"module.{name[:-1]}{f}_{name[-1]}": p[f].clone() for f in range(len(p))}
        else:
            older[f"module.{name}"] = p
    return older


@settings(max_examples=11, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_every_conversion_is_the_same_function(tmp_path_factory, more):
    model = random_model(more.draw)
    folder = tmp_path_factory.mktemp("fuzz")
    config = model.config
    idx = torch.randint(config.vocab_size, (2, config.block_size))
    expected = model(idx)
    checkpoint.save(folder / "ours.pt", model)
    published = torch.load(folder / "ours.pt", weights_only=True)["model"]
    torch.save(older_layout(published), folder / "older.pt")
    torch.save(published, folder / "bare.pt")
    theirs = to_gpt2(model)
    theirs.save_pretrained(folder / "hf")
    torch.testing.assert_close(theirs(idx).logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    for name in ("ours.pt", "older.pt", "bare.pt", "hf"):
        again, _ = checkpoint.load(str(folder / name))
        if config.n_head == again.config.n_head:  # a bare state dict does not tell; GPT-2's rule does
            torch.testing.assert_close(again(idx), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        if name != "hf":
            assert again.config.shapes == config.shapes
            for (*_, p), (*_, q) in zip(model.matrices(), again.matrices()):
                torch.testing.assert_close(q.weight, p.weight, rtol=1e-5, atol=1e-6 * p.weight.abs().max().item())
    dense, _ = checkpoint.load(str(folder / "hf"))
    back = to_gpt2(dense).state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(p, back[key]) for key, p in theirs.state_dict().items())  # bit for bit


def damage(content, rng):
    """Bytes with a few changes of the kinds that discs, networks and people make."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(content) or 1)
        length = rng.choice((1, 1, 4, 64))
        match rng.randrange(5):
            case 0 if content:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at:at + length] = rng.randbytes(length)
            case 2:
                del content[at:at + length]
            case 3:
                content[at:at] = content[at:at + length]
            case 4:
                del content[at:]
    return bytes(content)


COMMANDS = {  # {script: arguments of a run of milliseconds}
    "train.py": "--dataset=tiny --n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=2 --max_iters=1 "
                "--eval_iters=1 --gradient_accumulation_steps=1",
    "sample.py": "good.pt --max_new_tokens=1",
    "perplexity.py": "good.pt tiny",
    "prune.py": "--init_from=good.pt --out=made.pt",
    "kron_decompose.py": "8 16 1 --init_from=good.pt --out=made.pt",
    "kron_to_gpt.py": "good.pt made",
    "prepare_owt.py": "--data_files=rows.jsonl --tokenizer=byte_level --out=mine --threads=1",
    "play.py": "good.pt --port=0"}


@pytest.fixture
def tiny_world(workdir, monkeypatch):
    """A directory with all that the commands need, which each command gets a copy of."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(workdir / "cache"))
    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", lambda self: None)
    Path("world").mkdir()
    monkeypatch.chdir("world")
    write_dataset("tiny", 2000)
    write_byte_level_tokenizer("byte_level")
    shapes = mlp_shapes(8, 16, [2])
    checkpoint.save("good.pt", KronyGPT(KronyGPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=16,
                                                       shapes=shapes)))
    Path("rows.jsonl").write_text('{"text": "a b"}\n' * 5, encoding="utf-8")
    return Path.cwd()


@pytest.mark.parametrize("cases", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", COMMANDS)
def test_damaged_files_end_in_one_line_and_change_nothing(script, cases, tiny_world, monkeypatch):
    refused = 0
    for case in range(-1, cases):
        rng, place = random.Random(f"{script} {case}"), tiny_world.parent / f"case_{case}"
        shutil.copytree(tiny_world, place)
        monkeypatch.chdir(place)
        if case >= 0:  # before them, everything works
            path = rng.choice([path for path in sorted(Path().rglob("*")) if path.is_file()])
            path.write_bytes(damage(path.read_bytes(), rng))
        before = snapshot(place)
        said = run_here(script, *COMMANDS[script].split())
        assert case >= 0 or said.returncode == 0, said.stderr
        if said.returncode:
            refused += 1
            assert is_one_line_with("", said), (case, path, said.stderr)
            assert snapshot(place) == before, (case, path)
        shutil.rmtree(place)
    print(f"{script}: {cases} damaged files, {refused} refused")
