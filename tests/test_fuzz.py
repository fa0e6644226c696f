"""The algebra over random shapes, and every script over damaged commands and files, which end in one line.

FUZZ_CASES sets the number of shapes of each test; the seeds are fixed.
"""
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, kron_sum, run_here, to_gpt2
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_bad_input import is_one_line_with, snapshot, write_byte_level_tokenizer
from test_train import write_dataset

from kronygpt import checkpoint
from kronygpt.configurator import option_types
from kronygpt.kron import rearrange, van_loan
from model import KronyGPT, KronyGPTConfig, kron_linear, kron_weight, mlp_shapes
from prune import prune_matrix

CASES = int(os.environ.get("FUZZ_CASES", 40))
SIDES = st.tuples(*[st.integers(1, 6)] * 4)
ANY_SHAPE = settings(max_examples=CASES, deadline=None, derandomize=True, phases=[Phase.generate])


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


@settings(ANY_SHAPE, max_examples=1 + CASES // 4)
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
            for (name, p), (_, q) in zip(named_matrices(model), named_matrices(again)):
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


NINES = 25 * "9"
VALUES = [  # what is given for any option
    "", "-1", "0", "1", "3", "0.5", "1e39", "1e999", "nan", "inf", "None", "True", "false", "1_0", "²", "1,2", "1e", "'1'",
    "$(x)", NINES, f"-{NINES}", 5000 * "9", "1000000000000", 50 * "[", "é", 300 * "x", ".", "..", "new/", "none/none",
    "folder", "good.pt", "good.pt/x", "rows.jsonl", "tiny.py", "tiny", "FILE:none", "gpt2", "cpu", "meta", "cuda:9",
    "float16"]
ASSIGNED = ["None", "-1", "10**5000", "float('nan')", "''", "[1]", "b'x'", "lambda: 0", "1 / 0", "(" * 300, "{}", "1j"]
COMMANDS = {  # {script: arguments of a run of milliseconds}
    "train.py": "--dataset=tiny --n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=2 --max_iters=1 "
                "--eval_iters=1 --gradient_accumulation_steps=1 --device=cpu tiny.py",
    "sample.py": "good.pt --max_new_tokens=1 --device=cpu tiny.py",
    "perplexity.py": "good.pt tiny --device=cpu",
    "prune.py": "--init_from=good.pt --out=made.pt tiny.py",
    "kron_decompose.py": "8 16 1 --init_from=good.pt --out=made.pt tiny.py",
    "kron_to_gpt.py": "good.pt made",
    "prepare_owt.py": "--data_files=rows.jsonl --tokenizer=byte_level --out=mine --threads=1",
    "play.py": "good.pt --port=0",
    "experiments/compare.py": "--train_config=tiny.py --dataset=none"}
SLOW = {"compile", "push"}  # options that are not touched: the compiler takes a minute


def damaged_checkpoint(path, rng):
    """A well-formed checkpoint, in which values are of a wrong type or size."""
    content = torch.load(path, weights_only=True)
    odd = [None, 0, -1, 2**70, 1.5, float("nan"), "", "x", [], [1], {}, {"a": 1}, True, torch.zeros(0), torch.zeros(()),
           torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(1).expand(10**12),
           torch.zeros(2, 2, 2, 2), torch.zeros(4, 4).to_sparse()]
    where = rng.choice([content, content["model"], content["model_args"]])
    key = rng.choice([*where, "transformer.h.x.mlp.c_fc_0_0", "transformer.h.7.mlp.c_fc_0_0", 5])
    if rng.random() < 0.2:
        where.pop(key, None)
    else:
        where[key] = rng.choice(odd)
    torch.save(content, path)


def mutate(script, args, rng):
    """Change a command, or a file that it reads, once; returns the arguments."""
    types = {name: kind for name, kind in option_types(runpy.run_path(str(ROOT / script))).items() if name not in SLOW}
    name = rng.choice(list(types))
    match rng.choice(("value", "value", "value", "name", "argument", "bytes", "content", "config")):
        case "value":
            values = VALUES if types[name] is str else VALUES[:VALUES.index("é")]
            args.append(f"--{name}={rng.choice(values)}")
        case "name":
            at = rng.randrange(len(name) + 1)
            args.append(f"--{name[:at]}{rng.choice(['', '_', 'x', '-', '='])}{name[at + rng.randrange(2):]}")
        case "argument":
            at = rng.randrange(len(args))
            args[at:at + rng.randrange(2)] = rng.sample(VALUES, rng.randrange(2))
        case "bytes":
            path = rng.choice([path for path in sorted(Path().rglob("*")) if path.is_file()])
            path.write_bytes(damage(path.read_bytes(), rng))
        case "content":
            damaged_checkpoint("good.pt", rng)
        case "config":
            Path("tiny.py").write_text(f"{name} = {rng.choice(ASSIGNED)}\n", encoding="utf-8")
    return args


class StillWorking(Exception):
    """A command that runs for seconds has accepted its input."""


@pytest.fixture
def limits(monkeypatch):
    """Commands that wait or need much memory end soon."""
    def on_alarm(*args):
        raise StillWorking

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, hard))
    before = signal.signal(signal.SIGALRM, on_alarm)
    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", lambda self: None)
    yield
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def tiny_world(workdir, monkeypatch):
    """A directory with all that the commands need, which each command gets a copy of."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(workdir / "cache"))
    Path("world/folder").mkdir(parents=True)
    monkeypatch.chdir("world")
    write_dataset("tiny", 2000)
    write_byte_level_tokenizer("byte_level")
    shapes = mlp_shapes(8, 16, [2])
    checkpoint.save("good.pt", KronyGPT(KronyGPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=16,
                                                       shapes=shapes)))
    Path("rows.jsonl").write_text('{"text": "a b"}\n' * 5, encoding="utf-8")
    Path("tiny.py").write_text("_ = 1\n", encoding="utf-8")
    return Path.cwd()


def check_mutations(script, cases, world, monkeypatch):
    refused, wrong = 0, {}
    for case in range(-1, cases):
        rng, place = random.Random(f"{script} {case}"), world.parent / f"case_{case}"
        shutil.copytree(world, place)
        monkeypatch.chdir(place)
        args = COMMANDS[script].split()
        if case >= 0:
            args = mutate(script, args, rng)
        before = snapshot(place)
        signal.setitimer(signal.ITIMER_REAL, 5)
        try:
            said = run_here(script, *args)
        except BaseException as error:
            said = subprocess.CompletedProcess(args, -1, "", f"{type(error).__name__}: {error}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert case >= 0 or said.returncode == 0 or "compare" in script, said.stderr
        after = snapshot(place)
        changed = [path for path, content in before.items() if after.get(path) != content]
        leftovers = [path for path in after if path.endswith((".tmp", ".old"))]
        if said.returncode and "StillWorking" not in said.stderr:
            refused += 1
            if not is_one_line_with("", said) or changed or leftovers:
                wrong[case] = args[-3:], said.returncode, said.stderr[-500:], changed, leftovers
        shutil.rmtree(place)
    assert not wrong, "\n\n".join(map(str, wrong.items()))
    print(f"{script}: {cases} mutations, {refused} refused")


@pytest.mark.parametrize("script", COMMANDS)
def test_mutated_commands_and_files_end_in_one_line_and_change_nothing(script, tiny_world, limits, monkeypatch):
    check_mutations(script, 20, tiny_world, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS)
def test_many_mutated_commands_and_files(script, tiny_world, limits, monkeypatch):
    check_mutations(script, 200, tiny_world, monkeypatch)
