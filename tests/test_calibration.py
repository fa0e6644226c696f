"""calibration.py against plain computations and the model's own losses."""
import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import kron_sum, named_matrices, randomize_vectors, run_here

from kronygpt import calibration, checkpoint, least_squares
from kronygpt.calibration import contributions, interleave
from kronygpt.compress import factorize, reorder_units
from kronygpt.configurator import UserError
from kronygpt.kron import van_loan
from model import KronyGPT, KronyGPTConfig, mlp_shapes


def test_contributions_and_the_stream_are_those_of_a_plain_computation(small_model):
    tokens = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stream, block = calibration.ResidualStream(small_model, tokens), small_model.transformer.h[0]
        (_, _, qkv, heads, _), = stream.through(0, "attn")
        x = small_model.transformer.wte(tokens) + small_model.transformer.wpe(torch.arange(32))
        torch.testing.assert_close(qkv, block.attn.c_attn(block.ln_1(x)).flatten(0, 1))
        hidden = x + block.attn(block.ln_1(x))
        torch.testing.assert_close(stream.x, hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(block.attn.c_proj(heads).view_as(x), block.attn(block.ln_1(x)), rtol=1e-4, atol=1e-4)
        z = block.ln_2(hidden).flatten(0, 1) @ kron_sum(block.mlp.c_fc.A, block.mlp.c_fc.B) + block.mlp.c_fc.bias
        h = torch.nn.functional.gelu(z, approximate="tanh")
        added = h[:, :, None] * kron_sum(block.mlp.c_proj.A, block.mlp.c_proj.B)
        np.testing.assert_allclose(contributions(small_model, tokens)[0][0], added.var(0, correction=0).sum(1), rtol=1e-3)
        stream.move(0, "mlp")
        torch.testing.assert_close(stream.x, block(x), rtol=1e-4, atol=1e-4)


def test_fisher_moments_and_spectra_are_those_of_a_plain_loop(monkeypatch):
    """Beside autograd of one label at a time, weighted by its probability, and numpy."""
    torch.manual_seed(0)
    model = KronyGPT(KronyGPTConfig(block_size=5, vocab_size=6, n_layer=2, n_head=2, n_embd=8))
    for p in model.parameters():
        p.data.mul_(6)  # otherwise the blocks hardly matter
    randomize_vectors(model.eval())
    tokens, draws = torch.randint(6, (2, 5)), 10_000
    monkeypatch.setattr(calibration, "STATISTICS_TOKENS", 10 * draws)
    monkeypatch.setattr(calibration, "GRADIENT_TOKENS", 30_000)
    fisher, spectra = calibration.statistics(model, tokens.repeat(draws, 1), [*model.config.matrices])

    inputs, outputs = {}, {}
    hooks = [matrix.register_forward_hook(lambda matrix, x, y, name=name: (inputs.update({name: x[0]}),
                                                                           outputs.update({name: y}))[:0] or None)
             for name, matrix in named_matrices(model)]
    logp = model(tokens).log_softmax(-1)
    for hook in hooks:
        hook.remove()
    expected = dict.fromkeys(fisher, 0)
    for row, position, label in np.ndindex(2, 5, 6):  # drawn labels of different tokens have independent gradients of mean 0
        gradients = torch.autograd.grad(logp[row, position, label], list(outputs.values()), retain_graph=True)
        for name, g in zip(outputs, gradients):
            expected[name] += logp[row, position, label].exp().item() * (g[row].T @ g[row]).double().numpy() / tokens.numel()

    def root(S):
        values, vectors = np.linalg.eigh(S)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    for name, matrix in named_matrices(model):
        assert np.linalg.norm(fisher[name].numpy() - expected[name]) < 0.04 * np.linalg.norm(expected[name]), name
        covariance = np.cov(inputs[name].detach().flatten(0, 1).double().T.numpy(), bias=True)
        W = matrix.weight.detach().double().numpy()
        sigma = np.linalg.svd(root(covariance) @ W @ root(fisher[name].numpy()), compute_uv=False)
        np.testing.assert_allclose(spectra[name], sigma**2, rtol=1e-3, atol=1e-5 * sigma[0]**2)


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


def test_statistics_sample_a_long_text(trained, monkeypatch):
    model, tokens = trained[0], trained[1][:, :-1]
    sample, _ = calibration.statistics(model, tokens[::4], ["attn.c_proj"])
    monkeypatch.setattr(calibration, "STATISTICS_TOKENS", tokens.numel() // 4)
    found, _ = calibration.statistics(model, tokens, ["attn.c_proj"])
    assert all(torch.equal(found[name], F) for name, F in sample.items())


def test_dropout_takes_no_part(trained):
    model, tokens = trained
    dropping = KronyGPT.from_state_dict(dict(model.config.as_plain_types(), dropout=0.5), model.state_dict()).train()
    (one, fits), (other, same) = (calibrate(m, tokens, (32, 32, [1, 1])) for m in (model, dropping))
    assert fits == same and all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))


def test_matrices_that_are_dense_stay_as_they_are(trained):
    model, tokens = trained
    new, fits = calibrate(model, tokens, (32, 128, [1, 1]))
    assert not fits and all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), new.state_dict().values()))
    new = factorize(model, {"attn.c_attn": [(32, 1, 8), (32, 96, 1)], "mlp.c_proj": [(128, 32, 1), (128, 1, 8)]}, van_loan)
    fits = calibration.calibrate(model, new, tokens[:, :-1], refine_steps=2)
    assert [(f.layer, f.name) for f in fits] == [(0, "attn.c_attn"), (1, "mlp.c_proj")]
    for (name, old), (_, matrix) in zip(named_matrices(model), named_matrices(new)):
        is_same = torch.equal(old.weight, matrix.weight) and torch.equal(old.bias, matrix.bias)
        assert is_same == matrix.is_dense, name


def test_all_matrices_fitted_in_the_metric_keep_more_of_the_model(trained):
    model, tokens = trained
    kinds = [*model.config.matrices]
    fisher, _ = calibration.statistics(model, tokens[:, :-1], kinds)
    shapes = {kind: [(m, 1, 6)] * 2 for kind, (m, n) in model.config.matrices.items()}
    losses = {}
    for name, metric, steps in (("metric", fisher, 0), ("none", None, 0), ("refined", fisher, 50)):
        new = factorize(model, shapes, van_loan)
        plain = loss(new, tokens)
        fits = calibration.calibrate(model, new, tokens[:, :-1], metric, refine_steps=steps)
        assert [f.name for f in fits] == kinds * 2
        losses[name] = loss(new, tokens)
    assert losses["refined"] < losses["metric"] < losses["none"] < plain, (losses, plain)


@pytest.mark.parametrize("kind, place", [("attn.c_attn", 0), ("attn.c_proj", 2), ("mlp.c_fc", 0), ("mlp.c_proj", 2)])
def test_errors_are_smallest_in_the_metric(trained, kind, place):
    """One matrix of the first block is factored, so that its inputs are the dense model's."""
    model, tokens = trained[0], trained[1][:, :-1]
    (m, n), half = model.config.matrices[kind], kind.split(".")[0]
    fisher, _ = calibration.statistics(model, tokens, [kind])
    stream = calibration.ResidualStream(model, tokens)
    with torch.no_grad():
        if half == "mlp":
            stream.move(0, "attn")
        (_, *seen), = stream.through(0, half, move=False)
    x, y = seen[place:place + 2]
    M, errors = least_squares.metric(fisher[f"transformer.h.0.{kind}"], n, "cpu"), []
    for metric in (fisher, None):
        new = factorize(model, {kind: [(m, 1, 4), (m, n, 1)]}, van_loan)
        calibration.calibrate(model, new, tokens, metric)
        with torch.no_grad():
            E = (new.transformer.h[0].get_submodule(kind)(x) - y).double()
        errors.append([torch.einsum("ti,ij,tj->", E, metric, E).item() for metric in (M, torch.eye(n).double())])
    assert errors[0][0] < 0.99 * errors[1][0] and errors[1][1] < 0.99 * errors[0][1], errors


def test_each_matrix_is_fitted_to_the_dense_model_behind_those_before_it(trained):
    """Full rank reaches every matrix: beside numpy's ridge regression on the activations of both models."""
    model, tokens = trained[0], trained[1][:, :-1]
    new = factorize(model, {"attn.c_attn": [(32, 1, 4), (1, 96, 32)], "attn.c_proj": [(32, 1, 32)] * 2}, van_loan)
    calibration.calibrate(model, new, tokens)
    with torch.no_grad():
        dense, student = (calibration.ResidualStream(m, tokens) for m in (model, new))
        dense.move(0, "attn")
        (_, _, _, h, _), = student.through(0, "attn", move=False)
        pairs = [(0, "attn.c_proj", h, (dense.x - student.x).flatten(0, 1))]
        student.move(0, "attn")
        dense.move(0, "mlp")
        student.move(0, "mlp")
        (_, _, z, _, _), = dense.through(1, "attn", move=False)
        pairs.append((1, "attn.c_attn", student.input(1, "attn", slice(None)).flatten(0, 1), z))
    for layer, kind, inputs, targets in pairs:
        X, Y = (v.double().numpy() - v.double().numpy().mean(0) for v in (inputs, targets))
        W = model.transformer.h[layer].get_submodule(kind).weight.detach().double().numpy()
        G, matrix = X.T @ X / len(X), new.transformer.h[layer].get_submodule(kind)
        ridge = least_squares.RIDGE * G.diagonal().mean() * np.eye(32)
        best = np.linalg.solve(G + ridge, X.T @ Y / len(X) + ridge @ W)
        np.testing.assert_allclose(matrix.weight.detach(), best, rtol=1e-2, atol=2e-3)
        np.testing.assert_allclose(matrix(inputs).mean(0).detach(), targets.mean(0), atol=1e-4)
        assert np.linalg.norm(best - W) > 0.5, "nothing to make up for"


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
        for options in (dict(), dict(refine_steps=3), dict(fixed_B=True)):
            new, fits = calibrate(model, tokens, shape, **options)
            assert all(p.isfinite().all() for p in new.parameters()), (shape, options)
            assert all(math.isfinite(number) for f in fits for number in (
                f.weight_error_before, f.weight_error, f.output_error_before, f.output_error)), (shape, options, fits)
            for (name, old), (_, matrix) in zip(named_matrices(model), named_matrices(new)):
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


def test_another_order_is_the_same_function(mixed_model):
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randperm(512, generator=generator) for _ in range(5)]
    embd = torch.randperm(128, generator=generator)
    tokens = torch.randint(256, (2, 32), generator=generator)
    before = {name: p.clone() for name, p in mixed_model.state_dict().items()}
    with torch.no_grad():
        for orders in (dict(embd=embd), dict(hidden=hidden, embd=embd), dict(hidden=hidden)):
            other = reorder_units(mixed_model, **orders)
            torch.testing.assert_close(other(tokens), mixed_model(tokens), rtol=1e-3, atol=1e-3)
            if "embd" in orders:
                assert torch.equal(other.transformer.wte.weight, before["transformer.wte.weight"][:, embd])
    assert other.config.shapes["attn.c_attn"] == mixed_model.config.shapes["attn.c_attn"]
    assert torch.equal(other.transformer.h[1].mlp.c_fc.bias, before["transformer.h.1.mlp.c_fc.bias"][hidden[1]])
    assert all(torch.equal(p, before[name]) for name, p in mixed_model.state_dict().items())


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
    text = calibration.calibration_text("pattern", 1024, model.config, "cpu")
    order = [interleave(units, 32, 4) for units in contributions(model, text)[0]]  # the strongest units share no column
    expected = in_the_metric(reorder_units(model, hidden=order), text)
    for (_, _, matrix), (_, _, other) in zip(new.matrices(), expected.matrices()):
        assert torch.equal(matrix.A, other.A) and torch.equal(matrix.bias, other.bias)


def in_the_metric(model, text):
    new, mlp = compressed(model, (32, 32, [1, 1])), ["mlp.c_fc", "mlp.c_proj"]
    calibration.calibrate(model, new, text, calibration.statistics(model, text, mlp)[0], refine_steps=2)
    return new


@pytest.mark.parametrize("args, said", [
    (["32", "32", "1", "--attention_rank=33"], "33 factors of (32, 1)"), (["32", "32", "99"], "99 factors"),
    (["--budget=1K"], "1,000 parameters is not between"), (["--budget=1M"], "34,176, which the dense model has")])
def test_shapes_and_budgets_are_checked_before_the_work(trained, workdir, args, said):
    checkpoint.save("dense.pt", trained[0])
    done = run_here("kron_decompose.py", *args, "--init_from=dense.pt", "--calibrate=data_that_is_not_there")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_script_compresses_the_whole_model_to_a_budget(trained, workdir):
    model, tokens = trained
    checkpoint.save("dense.pt", model)
    make_data(tokens)
    args = ["--init_from=dense.pt", "--budget=20K", "--calibrate=pattern", "--calibration_tokens=1024"]
    losses = {}
    for name, options in (("ours", []), ("mlp", ["--matrices=mlp"]), ("none", ["--metric=none"]),
                          ("even", ["--metric=none", "--ranks=even"])):
        done = run_here("kron_decompose.py", *args, *options)
        assert done.returncode == 0, done.stderr
        new, rest = checkpoint.load("checkpoints/best_20K.pt")
        losses[name] = loss(new, tokens)
        assert 19_000 < sum(p.numel() for p in new.parameters()) <= 20_000
        assert rest["config"]["metric"] == ("none" if name in ("none", "even") else "fisher")
        assert rest["config"]["budget"] == "20K" and rest["config"]["ranks"] == ("even" if name == "even" else "loss")
        assert all(matrix.is_dense for _, kind, matrix in new.matrices() if "attn." in kind) == (name == "mlp")
        rows = re.findall(r"^ +(\d)  ([a-z_.]+) +(\d+|dense) +([\d,]+)(?: +(\d\.\d+))?$", done.stdout, re.M)
        assert len(rows) == (4 if name == "mlp" else 8)
        for layer, kind, rank, size, predicted in rows:
            matrix = new.transformer.h[int(layer)].get_submodule(kind)
            assert matrix.is_dense if rank == "dense" else len(matrix.A) == int(rank)
            assert sum(p.numel() for p in (matrix.A, matrix.B)) - matrix.is_dense == int(size.replace(",", ""))
            assert bool(predicted) == (name != "even")
        if name != "even":
            total = re.search(r"^in all ([\d,]+) parameters, (\d\.\d+) nats per token added$", done.stdout, re.M)
            assert int(total[1].replace(",", "")) == sum(int(row[3].replace(",", "")) for row in rows)
            assert float(total[2]) == pytest.approx(sum(float(row[4]) for row in rows), abs=2e-4)
    assert losses.pop("ours") < min(losses.values())


def test_script_takes_a_rank_for_attention(trained, workdir):
    checkpoint.save("dense.pt", trained[0])
    make_data(trained[1])
    for calibrated in ([], ["--calibrate=pattern", "--calibration_tokens=1024"]):
        done = run_here("kron_decompose.py", 32, 32, 1, "--attention_rank=5", "--init_from=dense.pt", "--out=a.pt",
                        *calibrated)
        assert done.returncode == 0, done.stderr
        shapes = checkpoint.load("a.pt")[0].config.shapes
        assert shapes["mlp.c_fc"] == [(32, 32, 1)] * 2
        assert shapes["attn.c_attn"] == shapes["attn.c_proj"] == [(32, 1, 5)] * 2
        assert len(re.findall(r"attn\.c_(?:attn|proj) +5 ", done.stdout)) == 4


def test_even_ranks_without_text_are_the_plain_svd(trained, workdir):
    checkpoint.save("dense.pt", trained[0])
    done = run_here("kron_decompose.py", "--init_from=dense.pt", "--budget=20K", "--ranks=even", "--out=a.pt")
    assert done.returncode == 0, done.stderr
    new = checkpoint.load("a.pt")[0]
    for (_, _, old), (_, name, matrix) in zip(trained[0].matrices(), new.matrices()):
        W = old.weight.detach().numpy()
        U, sigma, V = np.linalg.svd(W)
        r = len(matrix.A)
        np.testing.assert_allclose(matrix.weight.detach(), U[:, :r] * sigma[:r] @ V[:r], atol=1e-5)
        assert r * sum(W.shape) / W.size == pytest.approx(0.38, abs=0.06), name


def test_no_ranks_for_a_budget_is_one_line(trained, workdir):
    checkpoint.save("dense.pt", trained[0])
    for size, options, said in (("1K", [], "no shapes fit 1,000"), ("1K", ["--ranks=even"], "1,000 parameters is not"),
                                ("1M", ["--ranks=even"], "34,176, which the dense model has")):
        done = run_here("kron_decompose.py", "--init_from=dense.pt", f"--budget={size}", *options)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize("option, said", [
    ("--calibrate=nothing", "data/nothing"), ("--calibration_tokens=5", "too few"), ("--refine_steps=-1", "refine_steps"),
    ("--device=abacus", "abacus"), ("--metric=euclid", "metric is fisher or none"), ("--ranks=uneven", "ranks is loss or"),
    ("--matrices=attn", "matrices is all or mlp"), ("--attention_rank=-1", "attention_rank is at least 0")])
def test_wrong_options(trained, workdir, option, said):
    checkpoint.save("dense.pt", trained[0])
    make_data(trained[1])
    done = run_here("kron_decompose.py", "32", "32", "1", "--init_from=dense.pt", "--calibrate=pattern",
                    "--calibration_tokens=1024", "--out=a.pt", option)
    assert done.returncode == 2 and said in done.stderr and not (workdir / "a.pt").exists(), done.stderr
