"""calibration.py against plain computations and the model's own losses."""
import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import kron_sum, run_here

import calibration
import checkpoint
from calibration import contributions, interleave
from compress import factorize, reorder_units
from configurator import UserError
from kron import van_loan
from model import KronyGPT, KronyGPTConfig, mlp_shapes


def test_hidden_statistics_and_the_stream_are_those_of_a_plain_computation(small_model):
    tokens = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(0))
    stream = calibration.ResidualStream(small_model, tokens)
    with torch.no_grad():
        stream.attend(0)
        statistics = calibration.HiddenStatistics(small_model.transformer.h[0].mlp)
        for _, _, z, h, _ in stream.mlp(0):
            statistics.add(z, h)
    block = small_model.transformer.h[0]
    with torch.no_grad():
        x = small_model.transformer.wte(tokens) + small_model.transformer.wpe(torch.arange(32))
        hidden = x + block.attn(block.ln_1(x))
        x = block.ln_2(hidden).flatten(0, 1)
        z = x @ kron_sum(block.mlp.c_fc.A, block.mlp.c_fc.B) + block.mlp.c_fc.bias
        W = kron_sum(block.mlp.c_proj.A, block.mlp.c_proj.B)
        h, shifted = (torch.nn.functional.gelu(v, approximate="tanh") for v in (z, z + 1e-3))
    added = h[:, :, None] * W  # (tokens, 4C, C)
    np.testing.assert_allclose(statistics.contribution(), added.var(0, correction=0).sum(1), rtol=1e-3)
    slope = (shifted - h) / 1e-3
    np.testing.assert_allclose(statistics.sensitivity(), slope.square().mean(0) * W.square().sum(1), rtol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(stream.x, hidden + block.mlp(block.ln_2(hidden)), rtol=1e-4, atol=1e-4)


def test_strongest_units_share_no_factor():
    order = interleave(torch.tensor([1.0, 9, 2, 8, 3, 7]), 3, 2)
    assert order.view(3, 2)[:, 0].tolist() == [1, 3, 5] and sorted(order.tolist()) == list(range(6))


@pytest.fixture(scope="module")
def trained():
    """A small dense model after some training on a pattern, and the pattern's tokens."""
    torch.manual_seed(0)
    model = KronyGPT(KronyGPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=32))
    generator = torch.Generator().manual_seed(0)
    step = torch.randint(1, 6, (64, 1), generator=generator)
    tokens = (torch.randint(32, (64, 1), generator=generator) + step * torch.arange(17)) % 32
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    return model.eval(), tokens


def compressed(model, shape):
    """Van Loan's sums of (dim_1, dim_2, factors) in the place of the MLPs of a model."""
    return factorize(model, mlp_shapes(*shape), van_loan)


def calibrate(model, tokens, shape, **options):
    """A calibrated model, and the Fits."""
    new = compressed(model, shape)
    return new, calibration.calibrate(model, new, tokens[:, :-1], **options)


@torch.no_grad()
def loss(model, tokens):
    return model.eval()(tokens[:, :-1], tokens[:, 1:]).item()


@pytest.mark.parametrize("shape", [(32, 32, [1, 1]), (16, 16, [2, 3]), (32, 1, [8, 8]), (16, 128, [1, 1])])
def test_calibration_keeps_more_of_the_model(trained, shape):
    model, tokens = trained
    before = {name: p.clone() for name, p in model.state_dict().items()}
    plain = loss(compressed(model, shape), tokens)
    new, fits = calibrate(model, tokens, shape)
    refined, _ = calibrate(model, tokens, shape, refine_steps=50)
    dense = loss(model, tokens)
    assert loss(new, tokens) - dense < 0.6 * (plain - dense)
    assert loss(refined, tokens) < loss(new, tokens)
    assert [f.n_factors for f in fits] == [r for r in shape[2] for _ in "ab"]
    assert all(f.output_error < f.output_error_before for f in fits)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()), "the dense model was changed"


def test_dense_shape_keeps_the_function(trained):
    model, tokens = trained
    new, fits = calibrate(model, tokens, (32, 128, [1, 1]))
    assert max(f.output_error for f in fits) < 0.02 and max(f.weight_error for f in fits) < 0.1
    assert loss(new, tokens) == pytest.approx(loss(model, tokens), abs=2e-3)


def test_hidden_units_that_are_gone_cost_nothing(trained):
    model, tokens = copy.deepcopy(trained[0]), trained[1]
    for block in model.transformer.h:
        block.mlp.c_proj.A.data[:, ::2] = 0  # what pruning leaves
    for shape in ((32, 1, [16, 16]), (32, 32, [1, 1])):
        new, fits = calibrate(model, tokens, shape)
        assert all(0 <= f.output_error < 1 for f in fits) and math.isfinite(loss(new, tokens))


def make_dead(block, what):
    """Zeros that models have after pruning or a bad start, each of which leaves some moments without a spread."""
    mlp, norm = block.mlp, block.ln_2
    zeroed = {"c_fc": [mlp.c_fc.A], "c_proj": [mlp.c_proj.A], "both": [mlp.c_fc.A, mlp.c_proj.A],
              "a block": [mlp.c_fc.A, mlp.c_fc.bias, mlp.c_proj.A, mlp.c_proj.bias],
              "half of c_fc": [mlp.c_fc.A[:, :, ::2]], "half of c_proj": [mlp.c_proj.A[:, ::2]],
              "rows of c_fc": [mlp.c_fc.A[:, :8]], "columns of c_proj": [mlp.c_proj.A[:, :, :8]],
              "the layer norm's weight": [norm.weight], "the layer norm": [norm.weight, norm.bias]}[what]
    for p in zeroed:
        p.data.zero_()


@pytest.mark.parametrize("what", ["c_fc", "c_proj", "both", "a block", "half of c_fc", "half of c_proj", "rows of c_fc",
                                  "columns of c_proj", "the layer norm's weight", "the layer norm"])
def test_zeros_are_fitted_to_zeros(trained, what):
    model, tokens = copy.deepcopy(trained[0]), trained[1]
    for block in model.transformer.h:
        make_dead(block, what)
    for shape in ((32, 32, [1, 1]), (16, 16, [2, 3]), (32, 1, [8, 8]), (1, 128, [8, 8])):
        for options in (dict(), dict(refine_steps=3), dict(fixed_B=True, reorder=False)):
            new, fits = calibrate(model, tokens, shape, **options)
            assert all(p.isfinite().all() for p in new.parameters()), (shape, options)
            assert all(math.isfinite(number) for f in fits for number in (
                f.weight_error_before, f.weight_error, f.output_error_before, f.output_error)), (shape, options, fits)
            for (name, old), (_, matrix) in zip(model.matrices(), new.matrices()):
                if "c_fc" in name and not old.weight.any() and "refine_steps" not in options:
                    assert matrix.weight.abs().max() < 1e-6
            assert math.isfinite(loss(new, tokens))


@pytest.mark.parametrize("what", ["c_fc", "c_proj"])
def test_script_calibrates_a_model_with_zeros(trained, workdir, what):
    model = copy.deepcopy(trained[0])
    make_dead(model.transformer.h[0], what)
    checkpoint.save("dense.pt", model)
    make_data(trained[1])
    done = run_here("kron_decompose.py", 32, 32, 1, "--init_from=dense.pt", "--calibrate=pattern", "--out=a.pt",
                    "--calibration_tokens=1024", "--refine_steps=2")
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout and math.isfinite(loss(checkpoint.load("a.pt")[0], trained[1]))


def test_another_order_is_the_same_function(small_model):
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randperm(256, generator=generator) for _ in range(2)]
    embd = torch.randperm(64, generator=generator)
    tokens = torch.randint(256, (2, 32), generator=generator)
    before = {name: p.clone() for name, p in small_model.state_dict().items()}
    with torch.no_grad():
        for orders in (dict(hidden=hidden), dict(embd=embd), dict(hidden=hidden, embd=embd)):
            other = reorder_units(small_model, **orders)
            torch.testing.assert_close(other(tokens), small_model(tokens), rtol=1e-4, atol=1e-4)
    assert torch.equal(other.transformer.wte.weight, before["transformer.wte.weight"][:, embd])
    assert torch.equal(other.transformer.h[1].mlp.c_fc.bias, before["transformer.h.1.mlp.c_fc.bias"][hidden[1]])
    assert all(torch.equal(p, before[name]) for name, p in small_model.state_dict().items())


def test_contributions_find_the_units_that_matter(trained):
    model, tokens = trained
    hidden, embd = contributions(model, tokens[:, :-1])
    assert hidden.shape == (2, 128) and embd.shape == (32,)

    def loss_without(parameters):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            for p in parameters(broken.transformer.h[0].mlp):
                p.zero_()
        return loss(broken, tokens)

    order = hidden[0].argsort()
    weak, strong = (loss_without(lambda mlp, units=units: [mlp.c_proj.A[0, unit] for unit in units])
                    for units in (order[:32], order[-32:]))
    assert weak < strong
    order = embd.argsort()
    weak, strong = (loss_without(lambda mlp, units=units: [mlp.c_fc.A[0, unit] for unit in units])
                    for units in (order[:8], order[-8:]))
    assert weak < strong


@pytest.mark.parametrize("dim, shape", [("hidden", (32, 64, 1, 2)), ("embd", (16, 128, 2, 1))])
def test_pruning_by_contribution_and_refitting(trained, workdir, dim, shape):
    model, tokens = trained
    checkpoint.save("dense.pt", model)
    make_data(tokens)
    calibrated = ["--calibrate=pattern", "--calibration_tokens=1024"]
    losses = {}
    for name, options in (("even", []), ("odd", ["--select=odd"]), ("norm", ["--select=norm"]),
                          ("contribution", ["--select=contribution", *calibrated]),
                          ("even, refitted", ["--refit=True", *calibrated]),
                          ("contribution, refitted", ["--select=contribution", "--refit=True", *calibrated])):
        done = run_here("prune.py", "--init_from=dense.pt", f"--dim={dim}", "--out=pruned.pt", *options)
        assert done.returncode == 0, done.stderr
        pruned = checkpoint.load("pruned.pt")[0]
        fc = pruned.transformer.h[0].mlp.c_fc
        assert (*fc.A.shape[1:], *fc.B.shape[1:]) == shape
        B = fc.B.flatten().tolist()
        assert B == ([0, 1] if name == "odd" else [1, 0])
        losses[name] = loss(pruned, tokens)
    assert losses["even, refitted"] < losses["even"] and losses["contribution, refitted"] < losses["contribution"]
    assert losses["contribution, refitted"] < losses["odd"]


@pytest.mark.parametrize("options, said", [
    (["--refit=True"], "--calibrate"), (["--select=contribution"], "--calibrate"), (["--select=best"], "not best"),
    (["--select=norm", "--offset=1"], "--offset"), (["--refit=True", "--calibrate=nothing"], "data/nothing"),
    (["--calibrate=pattern"], "--refit"), (["--dim=layer", "--calibrate=pattern"], "--refit")])
def test_pruning_with_wrong_options(trained, workdir, options, said):
    checkpoint.save("dense.pt", trained[0])
    done = run_here("prune.py", "--init_from=dense.pt", "--out=pruned.pt", *options)
    assert done.returncode == 2 and said in done.stderr and not Path("pruned.pt").exists()


def test_shape_that_does_not_fit(trained):
    model, tokens = trained
    with pytest.raises(UserError, match="dim_1=7"):
        calibrate(model, tokens, (7, 32, [1, 1]))


def make_data(tokens):
    directory = Path("data/pattern")
    directory.mkdir(parents=True)
    for split in ("train", "val"):
        tokens.numpy().astype(np.uint16).tofile(directory / f"{split}.bin")
    directory.joinpath("meta.json").write_text(json.dumps(dict(
        vocab_size=256, tokenizer="bytes", tokens={}, documents={}, source="a test")))


def test_finalists_are_compared_on_other_text_than_they_are_calibrated_on(workdir):
    make_data(torch.arange(1024))
    Path("data/pattern/meta.json").write_text(json.dumps(dict(
        vocab_size=50257, tokenizer="gpt2", tokens={}, documents={}, source="a test")))
    config = KronyGPTConfig(block_size=32, vocab_size=50257, n_layer=1, n_head=1, n_embd=8)
    x, _ = calibration.calibration_text("pattern", 320, config, "cpu")
    between, y = calibration.calibration_text("pattern", 320, config, "cpu", between=True)
    assert x.shape == (10, 32) and between.shape == (9, 32) and torch.equal(y, between + 1)
    assert not set(x.flatten().tolist()) & set(between.flatten().tolist())


def test_script_calibrates(trained, workdir):
    model, tokens = trained
    checkpoint.save("dense.pt", model)
    make_data(tokens)
    args = ["32", "32", "1", "--init_from=dense.pt", "--calibrate=pattern", "--calibration_tokens=1024",
            "--refine_steps=2"]
    done = run_here("kron_decompose.py", *args, "--out=a.pt")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^ +\d  mlp\.c_(?:fc|proj) +1  +[\d.]+ → +[\d.]+  +[\d.]+ → +[\d.]+$", done.stdout, re.M)) == 4
    new, rest = checkpoint.load("a.pt")
    assert new.config.shapes["mlp.c_fc"] == [(32, 32, 1)] * 2 and rest["config"]["calibrate"] == "pattern"
    run_here("kron_decompose.py", *args, "--out=b.pt")
    assert (workdir / "a.pt").read_bytes() == (workdir / "b.pt").read_bytes()


def test_script_searches_a_budget_and_writes_the_best(trained, workdir):
    model, tokens = trained
    checkpoint.save("dense.pt", model)
    make_data(tokens)
    args = ["--init_from=dense.pt", "--budget=26K", "--calibrate=pattern", "--calibration_tokens=1024"]
    done = run_here("kron_decompose.py", *args, "--refine_steps=0")
    assert done.returncode == 0, done.stderr
    tried = re.findall(r"^ +(\d\.\d{4})  (\d+) (\d+) ([\d,]+)$", done.stdout, re.M)
    assert len(tried) >= 3 and tried == sorted(tried, key=lambda row: float(row[0]))
    new, _ = checkpoint.load("checkpoints/best_26K.pt")
    assert 0.95 * 26_000 < sum(p.numel() for p in new.parameters()) <= 26_000
    assert [str(dim) for dim in new.config.shapes["mlp.c_fc"][0][:2]] == list(tried[0][1:3])
    x, y = calibration.calibration_text("pattern", 1024, model.config, "cpu", between=True)
    with torch.no_grad():
        logp = new(x).log_softmax(-1).gather(2, y[:, :, None])
    assert -logp.mean().item() == pytest.approx(float(tried[0][0]), abs=1e-4)


def test_no_shape_for_a_budget_is_one_line(trained, workdir):
    checkpoint.save("dense.pt", trained[0])
    make_data(trained[1])
    for options in ([], ["--calibrate=pattern", "--calibration_tokens=1024"]):
        done = run_here("kron_decompose.py", "--init_from=dense.pt", "--budget=1K", *options)
        assert done.returncode == 2 and "no shapes fit 1,000" in done.stderr and done.stderr.count("\n") == 1
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize("option, said", [
    ("--calibrate=nothing", "data/nothing"), ("--calibration_tokens=5", "too few"), ("--refine_steps=-1", "refine_steps"),
    ("--device=abacus", "abacus")])
def test_wrong_options(trained, workdir, option, said):
    checkpoint.save("dense.pt", trained[0])
    make_data(trained[1])
    done = run_here("kron_decompose.py", "32", "32", "1", "--init_from=dense.pt", "--calibrate=pattern",
                    "--calibration_tokens=1024", "--out=a.pt", option)
    assert done.returncode == 2 and said in done.stderr and not (workdir / "a.pt").exists(), done.stderr
