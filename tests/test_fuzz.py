"""The algebra over random shapes, and the loaders over damaged files: nothing but the documented errors comes out.

FUZZ_CASES sets the number of cases of each test; the seeds are fixed.
"""
import json
import os
import random
import runpy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, kron_sum, run_here, to_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import is_one_line_with, write_byte_level_tokenizer
from test_train import write_dataset

from kronygpt import checkpoint, data
from kronygpt.configurator import UserError, option_types
from kronygpt.data import read_rows
from kronygpt.kron import rearrange, van_loan
from model import KronyGPT, KronyGPTConfig, kron_linear, kron_weight, mlp_shapes
from prune import prune_matrix

CASES = int(os.environ.get("FUZZ_CASES", 40))
SIDES = st.tuples(*[st.integers(1, 6)] * 4)
ANY_SHAPE = settings(max_examples=CASES, deadline=None, derandomize=True)


def random_factors(sides, r, seed):
    m1, n1, m2, n2 = sides
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(r, m1, n1, generator=generator, dtype=torch.double),
            torch.randn(r, m2, n2, generator=generator, dtype=torch.double))


@ANY_SHAPE
@given(SIDES, st.integers(1, 5), st.integers(0, 7), st.sampled_from("ABW"), st.integers(0, 99))
def test_contraction_and_its_gradients(sides, r, tokens, order, seed):
    A, B = random_factors(sides, r, seed)
    x = torch.randn(tokens, sides[0] * sides[2], dtype=torch.double)
    bias = torch.randn(sides[1] * sides[3], dtype=torch.double)
    inputs = [t.requires_grad_() for t in (x, A, B, bias)]
    ours, plain = kron_linear(x, A, B, bias, order), x @ kron_sum(A, B) + bias
    torch.testing.assert_close(ours, plain)
    grad = torch.randn_like(plain)
    for found, expected in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(plain, inputs, grad)):
        torch.testing.assert_close(found, expected)


@ANY_SHAPE
@given(SIDES, st.data(), st.integers(0, 99))
def test_van_loan_is_the_truncated_svd(sides, more, seed):
    m1, n1, m2, n2 = sides
    r = more.draw(st.integers(1, min(m1 * n1, m2 * n2)))
    W = torch.randn(m1 * m2, n1 * n2, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    A, B = van_loan(W, m1, n1, r)
    values = np.linalg.svd(rearrange(W, m1, n1).numpy(), compute_uv=False)
    error = np.linalg.norm(W.numpy() - kron_sum(A, B).numpy())
    assert error == pytest.approx(np.linalg.norm(values[r:]), abs=1e-6 * np.linalg.norm(values))


@ANY_SHAPE
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.booleans(), st.data())
def test_pruning_keeps_what_it_says(m, n, keep, rows, more):
    offset = more.draw(st.integers(0, keep - 1))
    W = torch.randn(m * keep, n) if rows else torch.randn(m, n * keep)
    A, B = prune_matrix(W, m, n, offset)
    kept = torch.zeros_like(W)
    place = (slice(offset, None, keep), slice(None))[::1 if rows else -1]
    kept[place] = W[place]
    assert torch.equal(kron_weight(A, B), kept)


def random_shape(draw, m, n):
    dim_1, dim_2 = (draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])) for size in (m, n))
    return dim_1, dim_2, draw(st.integers(1, 3))


def random_model(draw):
    """A small KronyGPT with any shapes of its matrices, and random weights everywhere."""
    n_head, head_dim, n_layer = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = dict(block_size=draw(st.integers(1, 5)), vocab_size=draw(st.integers(1, 9)), n_layer=n_layer, n_head=n_head,
                 n_embd=n_head * head_dim, n_inner=draw(st.sampled_from([None, 1, 6])))
    named = {name: size for name, size in KronyGPTConfig(**sizes).matrices.items() if draw(st.booleans())}
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


@ANY_SHAPE
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
            for key, p in model.state_dict().items():
                assert torch.equal(again.state_dict()[key], p)
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


def load_damaged(path):
    """Whether a file is refused, also for a resume, with a documented error of one line; damage to numbers is no reason."""
    try:
        checkpoint.load(str(path))
        checkpoint.load_to_resume(path)
        return False
    except (UserError, FileNotFoundError) as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error)
        return True


def one_block():
    torch.manual_seed(0)
    return KronyGPT(KronyGPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=4,
                                   shapes={**mlp_shapes(2, 4, [2]), "attn.c_attn": [(4, 1, 2)]}))


def test_damaged_checkpoints(tmp_path):
    model = one_block()
    optimizer = model.configure_optimizers(1e-3, 0.1, (0.9, 0.95))
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, model, optimizer, iter_num=3, best_val_loss=1.5, config={"seed": 1})
    content, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(25 * CASES):
        path.write_bytes(damage(content, rng))
        refused += load_damaged(path)
    assert refused > 5 * CASES
    print(f"{25 * CASES} damaged checkpoints, {refused} refused")


def test_checkpoints_of_odd_content(tmp_path):
    """Well-formed files whose values are of every wrong type and size."""
    model = one_block()
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, model)
    content, rng = torch.load(path, weights_only=True), random.Random(0)
    odd = [None, 0, -1, 2**70, 1.5, float("nan"), "", "x", [], [1], {}, {"a": 1}, True, torch.zeros(0), torch.zeros(()),
           torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(1).expand(10**12),
           torch.zeros(2, 2, 2, 2), torch.zeros(4, 4).to_sparse()]
    for case in range(25 * CASES):
        changed = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
        for _ in range(rng.choice((1, 1, 2))):
            where = rng.choice([changed, changed["model"], changed["model_args"]]
                               if isinstance(changed.get("model"), dict) and isinstance(changed.get("model_args"), dict)
                               else [changed])
            key = rng.choice([*where, "transformer.h.x.mlp.c_fc_0_0", "transformer.h.7.mlp.c_fc_0_0",
                              "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj_0", 5])
            if rng.random() < 0.2:
                where.pop(key, None)
            else:
                where[key] = rng.choice(odd)
        torch.save(changed, path)
        try:
            load_damaged(path)
        except Exception as error:
            raise AssertionError(f"case {case}: {changed}") from error


def test_damaged_meta(workdir):
    folder = Path("data/a")
    folder.mkdir(parents=True)
    np.arange(100, dtype=np.uint16).tofile(folder / "train.bin")
    content = json.dumps(dict(vocab_size=256, tokenizer="bytes", tokens=dict(train=100, val=0), documents={}, source="a"))
    rng = random.Random(0)
    refused = 0
    for _ in range(50 * CASES):
        (folder / "meta.json").write_bytes(damage(content.encode(), rng))
        try:
            data.load_tokens("a", "train", 256)
        except (UserError, FileNotFoundError) as error:
            assert len(str(error).splitlines()) == 1 and "data/a" in str(error)
            refused += 1
    assert refused > 10 * CASES
    print(f"{50 * CASES} damaged meta.json, {refused} refused")


def test_odd_meta(workdir):
    folder = Path("data/a")
    folder.mkdir(parents=True)
    np.arange(100, dtype=np.uint16).tofile(folder / "train.bin")
    odd = [None, 0, -1, 10**30, 1.5, "", "gpt2", [], [1], {}, {"train": "many"}, {"train": None}, True]
    rng = random.Random(0)
    for _ in range(10 * CASES):
        meta = dict(vocab_size=256, tokenizer="bytes", tokens=dict(train=100))
        for key in rng.sample(sorted(meta), rng.choice((1, 2, 3))):
            meta[key] = rng.choice(odd)
        (folder / "meta.json").write_text(json.dumps(rng.choice((meta, meta, meta, list(meta), None, 5))))
        try:
            data.load_tokens("a", "train", 256)
        except (UserError, FileNotFoundError) as error:
            assert len(str(error).splitlines()) == 1


NINES = 25 * "9"
NUMBERS = [  # values of a numeric option, of which some are good
    "", "-1", "0", "-0.0", "1", "0.5", "1e-400", "1e-320", "1e39", "1e999", "-1e999", "nan", "inf", "None", "True", "1j",
    "0x2", "1_0", "²", "1,2", "1e", "'1'", "$(x)",
    NINES, f"-{NINES}", f"1{400 * '0'}", 5000 * "9", "1000000000000", "-1000000000000", 50 * "[", 100_000 * "["]
TINY = {  # {script: arguments of a run of milliseconds}
    "train.py": "--dataset=tiny --n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=2 --max_iters=1 "
                "--eval_iters=1 --gradient_accumulation_steps=1 --device=cpu --overwrite=True",
    "sample.py": "good.pt --max_new_tokens=1 --device=cpu",
    "perplexity.py": "good.pt tiny --device=cpu",
    "prune.py": "--init_from=good.pt --out=made.pt",
    "kron_decompose.py": "8 16 1 --init_from=good.pt --out=made.pt",
    "prepare_owt.py": "--data_files=rows.jsonl --tokenizer=byte_level --out=mine --threads=1",
    "experiments/compare.py": "--train_config=tiny.py --dataset=none",
    "experiments/bench.py": "layer --shapes=8,16,1 --layer_shapes=16,64,1 --layer_tokens=1 --n_embd=16 --n_head=1 --n_layer=1 "
                "--repeats=1 --device=cpu",
}
LISTS = {"seeds", "learning_rates", "shapes", "layer_shapes", "layer_tokens", "factors"}
ENDLESS = {("train.py", "max_iters", "1000000000000")}


def odd_numbers(script):
    """All (option, value) of a script's options for numbers and NUMBERS."""
    types = option_types(runpy.run_path(str(ROOT / script)))
    return [(name, value) for name, kind in types.items() if kind in (int, float) or name in LISTS for value in NUMBERS
            if (script, name, value) not in ENDLESS]


@pytest.fixture
def tiny_world(workdir, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(workdir / "cache"))
    monkeypatch.setattr("kronygpt.device.matmul_flops", lambda device, dtype: 1e9)  # measuring it takes train.py a second
    write_dataset("tiny", 2000)
    write_byte_level_tokenizer("byte_level")
    checkpoint.save("good.pt", KronyGPT(KronyGPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=16)))
    Path("rows.jsonl").write_text('{"text": "a b"}\n' * 5)
    Path("tiny.py").write_text("seed = 1\n")


def check_odd_numbers(script, pairs):
    said = run_here(script, *TINY[script].split())
    assert said.returncode == 0 or script == "experiments/compare.py", said.stderr  # it would run others for minutes
    refused, wrong = 0, {}
    for name, value in pairs:
        try:
            said = run_here(script, *TINY[script].split(), f"--{name}={value}")
        except BaseException as error:
            wrong[name, value[:30]] = f"{type(error).__name__}: {error}"[:200]
            continue
        refused += said.returncode != 0
        if said.returncode and not is_one_line_with("", said):
            wrong[name, value[:30]] = said.stderr[-300:]
    assert not wrong
    return refused


@pytest.mark.parametrize("script", TINY)
def test_odd_numbers_for_options_are_used_or_refused_in_one_line(script, tiny_world):
    pairs = odd_numbers(script)
    pairs = random.Random(0).sample(pairs, min(len(pairs), CASES // 2))
    print(f"{script}: {check_odd_numbers(script, pairs)} of {len(pairs)} refused")


@pytest.mark.slow
@pytest.mark.parametrize("script", TINY)
def test_all_odd_numbers_for_options(script, tiny_world):
    pairs = odd_numbers(script)
    print(f"{script}: {check_odd_numbers(script, pairs)} of {len(pairs)} refused")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_damaged_texts(kind, workdir):
    path = Path(f"rows.{kind}")
    rows = [dict(text=f"Zeile {i}: naïve café") for i in range(20)]
    if kind == "parquet":
        pq.write_table(pa.table({"text": [row["text"] for row in rows]}), path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    content, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(10 * CASES):
        path.write_bytes(damage(content, rng))
        try:
            assert all(text is None or isinstance(text, str) for text in read_rows(path))
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and str(path) in str(error)
            refused += 1
    assert refused > CASES
    print(f"{10 * CASES} damaged {kind} files, {refused} refused")
