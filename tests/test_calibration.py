"""calibration.py against plain dense least squares, numpy's SVD and the model's own losses."""
import copy
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import kron_sum, run_here

import calibration
import checkpoint
from calibration import (
    Moments,
    Problem,
    calibrate,
    contributions,
    fit,
    half_step,
    interleave,
    reduced_rank,
    reordered,
    start,
)
from kron_decompose import van_loan
from model import KronyGPT, KronyGPTConfig, ModelError


def random_problem(m=12, n=20, tokens=200, weighted=True, seed=0, ridge=1e-3):
    """Correlated inputs with a mean, targets of W with noise; the data and their Problem."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, m, generator=generator) @ torch.randn(m, m, generator=generator) + 3
    W = torch.randn(m, n, generator=generator)
    Y = X @ W + torch.randn(tokens, n, generator=generator) + 5
    moments = Moments()
    for part in range(0, tokens, 64):
        moments.add(X[part:part + 64], Y[part:part + 64])
    weights = torch.rand(n, generator=generator) + 0.1 if weighted else None
    return X.double(), Y.double(), W, Problem(moments, W, weights, ridge)


def test_moments_are_those_of_numpy():
    X, Y, _, problem = random_problem()
    covariance = np.cov(torch.cat((X, Y), 1).T.numpy(), bias=True)
    np.testing.assert_allclose(problem.G, covariance[:12, :12], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(problem.C, covariance[:12, 12:], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(problem.variance, covariance.diagonal()[12:], rtol=1e-5)


def test_gram_in_strips_is_the_whole_product(monkeypatch):
    monkeypatch.setattr(calibration, "GRAM_COLUMNS", 4)
    for m in (3, 4, 11):
        X = torch.randn(7, m, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(calibration.gram(X), X.T @ X)


def test_moments_keep_their_digits_beside_a_large_mean():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(1000, 3, generator=generator)
    moments = Moments()
    for part in X.split(100):
        moments.add(part + 1000, part[:, :2] - 500)
    np.testing.assert_allclose(moments.centred()[2], np.cov(X.T.numpy(), bias=True), atol=1e-4)


def test_error_and_bias_are_those_of_the_data():
    X, Y, _, problem = random_problem()
    W = torch.randn(12, 20, dtype=torch.double)
    best = (Y - X @ W).mean(0)
    np.testing.assert_allclose(problem.bias(W), best, rtol=1e-4, atol=1e-4)
    for bias in (None, torch.ones(20)):
        residual = (Y - X @ W - (best if bias is None else bias)).square().mean(0)
        expected = (problem.weights * residual).sum() / (problem.weights * Y.var(0, correction=0)).sum()
        assert problem.error(W, bias) == pytest.approx(expected.item(), rel=1e-4)


def test_weights_that_meet_no_input_stay():
    X = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    X[:, 2] = 0
    W = torch.arange(12.0).view(4, 3)
    moments = Moments()
    moments.add(X, -X @ W)
    A, _ = fit(Problem(moments, W), W[None], torch.ones(1, 1, 1), fixed_B=True)
    torch.testing.assert_close(A[0, 2].float(), W[2])
    torch.testing.assert_close(A[0, 0].float(), -W[0], rtol=1e-2, atol=1e-2)


def test_hidden_statistics_and_the_stream_are_those_of_a_plain_computation(small_model):
    tokens = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(0))
    stream = calibration.Stream(small_model, tokens)
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
        z = x @ kron_sum(block.mlp.c_fc_0, block.mlp.c_fc_1) + block.mlp.c_fc_bias
        W = kron_sum(block.mlp.c_proj_0, block.mlp.c_proj_1)
        h, shifted = (torch.nn.functional.gelu(v, approximate="tanh") for v in (z, z + 1e-3))
    added = h[:, :, None] * W  # (tokens, 4C, C)
    np.testing.assert_allclose(statistics.contribution(), added.var(0, correction=0).sum(1), rtol=1e-3)
    slope = (shifted - h) / 1e-3
    np.testing.assert_allclose(statistics.sensitivity(), slope.square().mean(0) * W.square().sum(1), rtol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(stream.x, hidden + block.mlp(block.ln_2(hidden)), rtol=1e-4, atol=1e-4)


def dense_half_step(problem, A, B, weights):
    """The best A by one dense least-squares problem over all its elements at once, with the ridge as further rows."""
    root = torch.linalg.cholesky(problem.ridged_G).T  # ‖Y − XW‖² + ridge ‖W − W0‖² = ‖root W − target‖² + constant
    target = torch.linalg.solve_triangular(root.T, problem.ridged_C, upper=False)
    columns = []
    for element in range(A.numel()):
        unit = torch.zeros_like(A).view(-1)
        unit[element] = 1
        columns.append((root @ kron_sum(unit.view_as(A), B) * weights.sqrt()).reshape(-1))
    solution = np.linalg.lstsq(torch.stack(columns, 1).numpy(), (target * weights.sqrt()).reshape(-1).numpy(), rcond=None)
    return torch.from_numpy(solution[0]).view_as(A)


@pytest.mark.parametrize("dim_1, dim_2, r", [(4, 5, 1), (4, 5, 3), (12, 5, 1), (1, 4, 2), (3, 20, 1), (6, 1, 2)])
def test_half_step_is_the_dense_least_squares_solution(dim_1, dim_2, r, monkeypatch):
    _, _, W, problem = random_problem()
    A, B = (side.double() for side in van_loan(W, dim_1, dim_2, r))
    u, v = problem.separable_weights(dim_2, 20 // dim_2)
    expected = dense_half_step(problem, A, B, (u[:, None] * v).view(-1))
    found = half_step(problem.ridged_G, problem.ridged_C, A, B, v)
    torch.testing.assert_close(kron_sum(found, B), kron_sum(expected, B), rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(calibration, "LARGEST_SYSTEM", 0)
    monkeypatch.setattr(calibration, "CG_STEPS", 200)
    found = half_step(problem.ridged_G, problem.ridged_C, A, B, v)
    torch.testing.assert_close(kron_sum(found, B), kron_sum(expected, B), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("largest_system", [4096, 0])
@pytest.mark.parametrize("dim_1, dim_2, r", [(4, 5, 1), (4, 5, 3), (12, 10, 1), (3, 4, 2)])
def test_the_objective_never_rises(dim_1, dim_2, r, largest_system, monkeypatch):
    monkeypatch.setattr(calibration, "LARGEST_SYSTEM", largest_system)
    monkeypatch.setattr(calibration, "TOLERANCE", -1.0)
    _, _, _, problem = random_problem()
    u, v = problem.separable_weights(dim_2, 20 // dim_2)
    weights = (u[:, None] * v).view(-1)
    pair = start(problem, van_loan, dim_1, dim_2, r)
    values = [problem.objective(kron_sum(*pair), weights)]
    for _ in range(10):
        pair = fit(problem, *pair, steps=1)
        values.append(problem.objective(kron_sum(*pair), weights))
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(values)), values
    assert values[-1] < 0.9999 * values[0]


@pytest.mark.parametrize("m, n", [(12, 20), (20, 12)])
@pytest.mark.parametrize("r", [1, 4])
def test_reduced_rank_is_the_optimum(m, n, r):
    _, _, _, problem = random_problem(m, n)
    root = torch.linalg.cholesky(problem.ridged_G).T.numpy()
    target = np.linalg.solve(root.T, problem.ridged_C.numpy())
    best = np.linalg.svd(target * problem.weights.sqrt().numpy(), compute_uv=False)[r:]
    for A_is_column in (True, False):
        A, B = reduced_rank(problem, r, A_is_column)
        distance = (root @ kron_sum(A, B).numpy() - target) * problem.weights.sqrt().numpy()
        assert np.square(distance).sum() == pytest.approx(np.square(best).sum(), rel=1e-6)
        assert A.shape == ((r, m, 1) if A_is_column else (r, 1, n))


def test_alternating_least_squares_reaches_the_closed_form_of_low_rank():
    _, _, W, problem = random_problem(weighted=False)
    exact = kron_sum(*reduced_rank(problem, 3, True))
    A, B = (side.double() for side in van_loan(W, 12, 1, 3))
    for _ in range(300):
        A = half_step(problem.ridged_G, problem.ridged_C, A, B, torch.ones(20, dtype=torch.double))
        G, C = problem.ridged_G, problem.ridged_C  # swapping the sides of a low rank changes no index
        B = half_step(G, C, B, A, torch.ones(1, dtype=torch.double))
    torch.testing.assert_close(kron_sum(A, B), exact, rtol=1e-3, atol=1e-3)


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


@torch.no_grad()
def loss(model, tokens):
    return model.eval()(tokens[:, :-1], tokens[:, 1:]).item()


@pytest.mark.parametrize("shape", [(32, 32, [1, 1]), (16, 16, [2, 3]), (32, 1, [8, 8]), (16, 128, [1, 1])])
def test_calibration_keeps_more_of_the_model(trained, shape):
    model, tokens = trained
    before = {name: p.clone() for name, p in model.state_dict().items()}
    plain = loss(model.refactored(*shape, van_loan), tokens)
    new, fits = calibrate(model, tokens[:, :-1], *shape, van_loan)
    refined, _ = calibrate(model, tokens[:, :-1], *shape, van_loan, refine_steps=50)
    dense = loss(model, tokens)
    assert loss(new, tokens) - dense < 0.6 * (plain - dense)
    assert loss(refined, tokens) < loss(new, tokens)
    assert [f.n_factors for f in fits] == [r for r in shape[2] for _ in "ab"]
    assert all(f.output_error < f.output_error_before for f in fits)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()), "the dense model was changed"


def test_dense_shape_keeps_the_function(trained):
    model, tokens = trained
    new, fits = calibrate(model, tokens[:, :-1], 32, 128, [1, 1], van_loan)
    assert max(f.output_error for f in fits) < 0.02 and max(f.weight_error for f in fits) < 0.1
    assert loss(new, tokens) == pytest.approx(loss(model, tokens), abs=2e-3)


def test_hidden_units_that_are_gone_cost_nothing(trained):
    model, tokens = copy.deepcopy(trained[0]), trained[1]
    for block in model.transformer.h:
        block.mlp.c_proj_0.data[:, ::2] = 0  # what pruning leaves
    for shape in ((32, 1, [16, 16]), (32, 32, [1, 1])):
        new, fits = calibrate(model, tokens[:, :-1], *shape, van_loan)
        assert all(0 <= f.output_error < 1 for f in fits) and math.isfinite(loss(new, tokens))


def test_another_order_is_the_same_function(small_model):
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randperm(256, generator=generator) for _ in range(2)]
    embd = torch.randperm(64, generator=generator)
    tokens = torch.randint(256, (2, 32), generator=generator)
    before = {name: p.clone() for name, p in small_model.state_dict().items()}
    with torch.no_grad():
        for orders in (dict(hidden=hidden), dict(embd=embd), dict(hidden=hidden, embd=embd)):
            other = reordered(small_model, **orders)
            torch.testing.assert_close(other(tokens), small_model(tokens), rtol=1e-4, atol=1e-4)
    assert torch.equal(other.transformer.wte.weight, before["transformer.wte.weight"][:, embd])
    assert torch.equal(other.transformer.h[1].mlp.c_fc_bias, before["transformer.h.1.mlp.c_fc_bias"][hidden[1]])
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
    weak, strong = (loss_without(lambda mlp, units=units: [mlp.c_proj_0[0, unit] for unit in units])
                    for units in (order[:32], order[-32:]))
    assert weak < strong
    order = embd.argsort()
    weak, strong = (loss_without(lambda mlp, units=units: [mlp.c_fc_0[0, unit] for unit in units])
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
        assert pruned.config.sides == shape
        B = pruned.transformer.h[0].mlp.c_fc_1.flatten().tolist()
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
    with pytest.raises(ModelError, match="dim_1=7"):
        calibrate(model, tokens[:, :-1], 7, 32, [1, 1], van_loan)


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
    assert len(re.findall(r"^ +\d  c_(?:fc|proj) +1  +[\d.]+ → +[\d.]+  +[\d.]+ → +[\d.]+$", done.stdout, re.M)) == 4
    new, rest = checkpoint.load("a.pt")
    assert new.config.sides == (32, 32, 1, 4) and rest["config"]["calibrate"] == "pattern"
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
    assert [str(new.config.dim_1), str(new.config.dim_2)] == list(tried[0][1:3])
    x, y = calibration.calibration_text("pattern", 1024, model.config, "cpu", between=True)
    with torch.no_grad():
        logp = new(x).log_softmax(-1).gather(2, y[:, :, None])
    assert -logp.mean().item() == pytest.approx(float(tried[0][0]), abs=1e-4)


def test_no_shape_for_a_budget_is_one_line(trained, workdir):
    checkpoint.save("dense.pt", trained[0])
    make_data(trained[1])
    for options in ([], ["--calibrate=pattern", "--calibration_tokens=1024"]):
        done = run_here("kron_decompose.py", "--init_from=dense.pt", "--budget=1K", *options)
        assert done.returncode == 2 and "no shapes come to 1,000" in done.stderr and done.stderr.count("\n") == 1
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
