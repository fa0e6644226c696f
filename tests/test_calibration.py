"""calibration.py against plain computations and the model's own losses."""
import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import kron_sum, named_matrices, random_tokens, randomize_vectors, run_here, square_root, succeed
from test_data import write_dataset
from torch.nn import functional as F

from kronygpt import calibration, checkpoint, data, least_squares
from kronygpt.budget import Plan, plan_widths
from kronygpt.calibration import contributions
from kronygpt.compress import apply, factorize, spread_units
from kronygpt.export import to_compressed
from model import KINDS, KronyGPT, KronyGPTConfig, mlp_shapes


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


def test_contributions_and_the_stream_are_those_of_a_plain_computation(small_model):
    tokens = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stream, block = calibration.ResidualStream(small_model, tokens), small_model.transformer.h[0]
        (_, normed, heads), = stream.through(0, "attn")
        x = small_model.transformer.wte(tokens) + small_model.transformer.wpe(torch.arange(32))
        torch.testing.assert_close(normed, block.ln_1(x).flatten(0, 1))
        hidden = x + block.attn(block.ln_1(x))
        torch.testing.assert_close(stream.x, hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(block.attn.c_proj(heads).view_as(x), block.attn(block.ln_1(x)), rtol=1e-4, atol=1e-4)
        z = block.ln_2(hidden).flatten(0, 1) @ kron_sum(block.mlp.c_fc.A, block.mlp.c_fc.B) + block.mlp.c_fc.bias
        h = torch.nn.functional.gelu(z, approximate="tanh")
        added = h[:, :, None] * kron_sum(block.mlp.c_proj.A, block.mlp.c_proj.B)
        np.testing.assert_allclose(contributions(small_model, tokens)[0], added.var(0, correction=0).sum(1), rtol=1e-3)
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
    found = calibration.statistics(model, tokens.repeat(draws, 1))
    fisher = found.fisher

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

    for name, matrix in named_matrices(model):
        assert np.linalg.norm(fisher[name].numpy() - expected[name]) < 0.04 * np.linalg.norm(expected[name]), name
        covariance = np.cov(inputs[name].detach().flatten(0, 1).double().T.numpy(), bias=True)
        W = matrix.weight.detach().double().numpy()
        sigma = np.linalg.svd(square_root(covariance) @ W @ square_root(fisher[name]), compute_uv=False)
        np.testing.assert_allclose(found.spectrum(name, matrix), sigma**2, rtol=1e-3, atol=1e-5 * sigma[0]**2)


def test_statistics_are_those_of_plain_forward_passes(trained, monkeypatch):
    model, tokens = copy.deepcopy(trained[0]), trained[1][:, :-1]
    monkeypatch.setattr(calibration, "GRADIENT_TOKENS", 100)
    found = calibration.statistics(model, tokens)
    inputs = {}
    for name, matrix in named_matrices(model):
        matrix.register_forward_hook(lambda matrix, x, y, name=name: inputs.update({name: x[0].flatten(0, 1)}))
    with torch.no_grad():
        x = model.hidden(tokens).flatten(0, 1).double()
        p = model(tokens).softmax(-1).flatten(0, 1)
    for name, _ in named_matrices(model):
        X = inputs[name].double().numpy()
        np.testing.assert_allclose(found.means[name], X.mean(0), atol=1e-5)
        np.testing.assert_allclose(found.covariances[name], np.cov(X.T, bias=True), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.hidden, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.probabilities, p.mean(0), atol=1e-6)
    assert found.uncertainty == pytest.approx(1 - p.square().sum(1).mean().item(), rel=1e-5)
    np.testing.assert_allclose(found.frequencies, [(tokens == v).double().mean() for v in range(256)], atol=1e-9)
    # an error e in the sum of the embeddings adds about ½ e F e to the loss
    e = 0.02 * torch.randn(*tokens.shape, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        added = loss_of_samples(model, tokens, p, e) - loss_of_samples(model, tokens, p, 0 * e)
    assert added.item() == pytest.approx(torch.einsum("bti,ij,btj->", e.double(), found.embedding_fisher, e.double()).item()
                                         / 2 / tokens.numel(), rel=0.3)


def loss_of_samples(model, tokens, p, e):
    """Cross entropy of the model's own probabilities p, with an error e in the sum of its embeddings."""
    hook = model.transformer.drop.register_forward_hook(lambda module, inputs, output: output + e)
    logp = model(tokens).log_softmax(-1).flatten(0, 1)
    hook.remove()
    return -(p * logp).sum(1).mean()


def calibrate(model, tokens, shape, **options):
    """A calibrated model with (dim_1, dim_2, factors) in the place of its MLPs, and the Fits."""
    new = factorize(model, mlp_shapes(*shape))
    return new, calibration.calibrate(model, new, tokens[:, :-1], **options)


@torch.no_grad()
def loss(model, tokens):
    return model.eval()(tokens[:, :-1], tokens[:, 1:]).item()


@pytest.mark.parametrize("shape", [(32, 32, [1, 1]), (16, 16, [2, 3]), (32, 1, [8, 8]), (16, 128, [1, 1])])
def test_calibration_keeps_more_of_the_model(trained, shape):
    model, tokens = trained
    before = {name: p.clone() for name, p in model.state_dict().items()}
    plain = loss(factorize(model, mlp_shapes(*shape)), tokens)
    new, fits = calibrate(model, tokens, shape)
    dense = loss(model, tokens)
    assert loss(new, tokens) - dense < 0.6 * (plain - dense)
    assert [f.n_factors for f in fits] == [r for r in shape[2] for _ in "ab"]
    assert all(f.output_error < f.output_error_before for f in fits)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()), "the dense model was changed"


def test_statistics_sample_a_long_text(trained, monkeypatch):
    model, tokens = trained[0], trained[1][:, :-1]
    sample = calibration.statistics(model, tokens[::4]).fisher
    monkeypatch.setattr(calibration, "STATISTICS_TOKENS", tokens.numel() // 4)
    found = calibration.statistics(model, tokens).fisher
    assert all(torch.equal(found[name], F) for name, F in sample.items())


def test_matrices_that_are_dense_stay_as_they_are(trained):
    model, tokens = trained
    new = factorize(model, {"attn.c_attn": [(32, 1, 8), (32, 96, 1)], "mlp.c_proj": [(128, 32, 1), (128, 1, 8)]})
    fits = calibration.calibrate(model, new, tokens[:, :-1])
    assert [(f.layer, f.name) for f in fits] == [(0, "attn.c_attn"), (1, "mlp.c_proj")]
    for (name, old), (_, matrix) in zip(named_matrices(model), named_matrices(new)):
        is_same = torch.equal(old.weight, matrix.weight) and torch.equal(old.bias, matrix.bias)
        assert is_same == matrix.is_dense, name


def test_all_matrices_fitted_in_the_metric_keep_more_of_the_model(trained):
    model, tokens = trained
    fisher = calibration.statistics(model, tokens[:, :-1]).fisher
    shapes = {kind: [(m, 1, 6)] * 2 for kind, (m, n) in model.config.sizes(0).items()}
    losses = [loss(factorize(model, shapes), tokens)]
    for metric in None, fisher:
        new = factorize(model, shapes)
        assert [f.name for f in calibration.calibrate(model, new, tokens[:, :-1], metric)] == [*KINDS] * 2
        losses.append(loss(new, tokens))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == loss(apply(model, Plan("", shapes, fisher=fisher), tokens[:, :-1])[0], tokens)


def test_a_compressed_export_in_bfloat16_has_the_loss_of_the_float32_one(trained, tmp_path):
    model, tokens = trained
    plan, = plan_widths(model, [24_000], calibration.statistics(model, tokens[:, :-1]))
    exported = to_compressed(apply(model, plan, tokens[:, :-1])[0])
    losses = [F.cross_entropy(exported.to(dtype)(tokens[:, :-1]).logits.float().mT, tokens[:, 1:]).item()
              for dtype in (torch.float32, torch.bfloat16)]
    assert losses[1] == pytest.approx(losses[0], abs=0.002)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_smallest_in_the_metric(trained, kind):
    """One matrix of the first block is factored, so that its inputs are the dense model's."""
    model, tokens = trained[0], trained[1][:, :-1]
    (m, n), half = model.config.sizes(0)[kind], kind.split(".")[0]
    fisher = calibration.statistics(model, tokens).fisher
    stream = calibration.ResidualStream(model, tokens)
    with torch.no_grad():
        if half == "mlp":
            stream.move(0, "attn")
        (_, *inputs), = stream.through(0, half, move=False)
        x = inputs[kind.endswith("c_proj")]
        y = model.transformer.h[0].get_submodule(kind)(x)
    M, errors = least_squares.metric(fisher[f"transformer.h.0.{kind}"], n, "cpu"), []
    for metric in (fisher, None):
        new = factorize(model, {kind: [(m, 1, 4), (m, n, 1)]})
        calibration.calibrate(model, new, tokens, metric)
        with torch.no_grad():
            E = (new.transformer.h[0].get_submodule(kind)(x) - y).double()
        errors.append([torch.einsum("ti,ij,tj->", E, metric, E).item() for metric in (M, torch.eye(n).double())])
    assert errors[0][0] < 0.99 * errors[1][0] and errors[1][1] < 0.99 * errors[0][1], errors


def test_each_matrix_is_fitted_to_the_dense_model_behind_those_before_it(trained):
    """Full rank reaches every matrix: beside numpy's ridge regression on the activations of both models."""
    model, tokens = trained[0], trained[1][:, :-1]
    new = factorize(model, {"attn.c_attn": [(32, 1, 4), (1, 96, 32)], "attn.c_proj": [(32, 1, 32)] * 2})
    calibration.calibrate(model, new, tokens)
    with torch.no_grad():
        dense, student = (calibration.ResidualStream(m, tokens) for m in (model, new))
        dense.move(0, "attn")
        (_, _, h), = student.through(0, "attn", move=False)
        pairs = [(0, "attn.c_proj", h, (dense.x - student.x).flatten(0, 1))]
        student.move(0, "attn")
        dense.move(0, "mlp")
        student.move(0, "mlp")
        (_, x, _), = dense.through(1, "attn", move=False)
        z = model.transformer.h[1].attn.c_attn(x)
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


def make_dead(block, what):
    """Zeros that models have after pruning or a bad start, most of which leave some moments without a spread."""
    mlp, norm = block.mlp, block.ln_2
    zeroed = {"c_fc": [mlp.c_fc.A], "c_proj": [mlp.c_proj.A], "half of c_fc": [mlp.c_fc.A[:, :, ::2]],
              "half of the units": [mlp.c_proj.A[:, ::2]],
              "a block": [mlp.c_fc.A, mlp.c_fc.bias, mlp.c_proj.A, mlp.c_proj.bias],
              "columns of c_proj": [mlp.c_proj.A[:, :, :8]], "the layer norm": [norm.weight, norm.bias]}[what]
    for p in zeroed:
        p.data.zero_()


@pytest.mark.parametrize("what", ["c_fc", "c_proj", "a block", "half of c_fc", "half of the units", "columns of c_proj",
                                  "the layer norm"])
def test_zeros_are_fitted_to_zeros(trained, what):
    model, tokens = copy.deepcopy(trained[0]), trained[1]
    for block in model.transformer.h:
        make_dead(block, what)
    for shape in ((16, 16, [2, 3]), (32, 1, [8, 8])):
        for options in (dict(), dict(fixed_B=True)):
            new, fits = calibrate(model, tokens, shape, **options)
            assert all(p.isfinite().all() for p in new.parameters()), (shape, options)
            assert all(math.isfinite(number) for f in fits for number in (
                f.weight_error_before, f.weight_error, f.output_error_before, f.output_error)), (shape, options, fits)
            for (name, old), (_, matrix) in zip(named_matrices(model), named_matrices(new)):
                if "c_fc" in name and not old.weight.any():
                    assert matrix.weight.abs().max() < 1e-6
            assert math.isfinite(loss(new, tokens))


def test_the_strongest_units_stand_apart_in_the_same_function(mixed_model):
    tokens = random_tokens(3, 32)
    before = {name: p.clone() for name, p in mixed_model.state_dict().items()}
    with torch.no_grad():
        other = spread_units(mixed_model, tokens, 128)
        torch.testing.assert_close(other(tokens), mixed_model(tokens), rtol=1e-3, atol=1e-3)
    for old, new in zip(contributions(mixed_model, tokens), contributions(other, tokens)):
        np.testing.assert_allclose(new[::4], old.sort(descending=True).values[:128], rtol=1e-3)
    assert other.config.shapes["attn.c_attn"] == mixed_model.config.shapes["attn.c_attn"]
    assert all(torch.equal(p, before[name]) for name, p in mixed_model.state_dict().items())


def test_pruning_by_contribution_and_refitting(model, trained):
    losses = []
    for options in ([], ["--select=contribution"], ["--select=contribution", "--refit=True"]):
        calibrated = ["--calibrate=pattern", "--calibration_tokens=1024"] if options else []
        succeed("prune.py", "--init_from=dense.pt", "--dim=hidden", "--out=pruned.pt", *options, *calibrated)
        pruned = checkpoint.load("pruned.pt")[0]
        assert pruned.transformer.h[0].mlp.c_fc.B.flatten().tolist() == [1, 0]
        losses.append(loss(pruned, trained[1]))
    assert losses == sorted(losses, reverse=True), losses


@pytest.fixture
def model(trained, workdir):
    """The trained model, which is in dense.pt, and whose tokens are the data set pattern."""
    checkpoint.save("dense.pt", trained[0])
    write_dataset("pattern", trained[1].numpy(), trained[1].numpy())
    return trained[0]


NUMBERS = ["--init_from=dense.pt", "--calibrate=pattern", "--calibration_tokens=1024"]


def test_script_calibrates(model):
    done = succeed("kron_decompose.py", 32, 32, 1, *NUMBERS, "--out=a.pt")
    assert len(re.findall(r"^ +\d  mlp\.c_(?:fc|proj) +1  +[\d.]+ → +[\d.]+  +[\d.]+ → +[\d.]+$", done.stdout, re.M)) == 4
    new, rest = checkpoint.load("a.pt")
    assert new.config.shapes["mlp.c_fc"] == [(32, 32, 1)] * 2 and rest["config"]["calibrate"] == "pattern"
    run_here("kron_decompose.py", 32, 32, 1, *NUMBERS, "--out=b.pt")
    assert Path("a.pt").read_bytes() == Path("b.pt").read_bytes()
    text = data.calibration_text("pattern", 1024, model.config, "cpu")
    ordered = spread_units(model, text, 32)
    expected = factorize(ordered, mlp_shapes(32, 32, [1, 1]))
    fisher = calibration.statistics(ordered, text).fisher
    calibration.calibrate(ordered, expected, text, fisher)
    for (_, _, matrix), (_, _, other) in zip(new.matrices(), expected.matrices()):
        assert torch.equal(matrix.A, other.A) and torch.equal(matrix.bias, other.bias)


@pytest.mark.parametrize("matrices", ["all", "mlp"])
def test_script_compresses_the_whole_model_to_a_budget(model, matrices):
    done = succeed("kron_decompose.py", *NUMBERS, "--budget=20K", f"--matrices={matrices}")
    new, rest = checkpoint.load("checkpoints/best_20K.pt")
    assert 19_000 < new.count_parameters()["total"] <= 20_000
    assert rest["config"]["budget"] == "20K" and rest["config"]["matrices"] == matrices
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"^ +\d +(\d+|dense)", line)]
    kinds, widths = ([*KINDS], ("head_qk", "head_v", "n_inner")) if matrices == "all" else (["mlp.c_fc", "mlp.c_proj"], ())
    assert rows == [[str(layer), *" ".join(str(getattr(new.config, width)[layer]).strip("[]").replace(",", "")
                                           for width in widths).split(),
                     *("dense" if dim_2 > 1 else str(r) for _, dim_2, r in (
                         new.config.shapes[kind][layer] for kind in kinds))] for layer in range(2)]
    assert (new.config.head_qk + new.config.head_v != [[16] * 2] * 4) == (matrices == "all")
    assert matrices == "all" or all(matrix.is_dense for _, kind, matrix in new.matrices() if "attn." in kind)
    parts = re.search(r"^predicted loss added \(order only\): ([\d.e-]+) nats per token: (.*)$", done.stdout, re.M)
    assert sum(float(part.split()[1]) for part in parts[2].split(", ")) == pytest.approx(float(parts[1]), rel=0.01)

    measured = re.search(r"^loss on ([\d,]+) held-out tokens: ([\d.]+) → ([\d.]+) nats per token, ([\d.-]+) added "
                         r"\(predicted, order only: ([\d.e-]+)\)$", done.stdout, re.M)
    rows = np.fromfile("data/pattern/val.bin", np.uint16).astype(np.int64)  # 16 tokens of a window are read, 15 scored
    starts = np.linspace(0, len(rows) - 17, len(rows) // 16).astype(int)
    windows = torch.from_numpy(np.stack([rows[start:start + 16] for start in starts]))
    assert int(measured[1].replace(",", "")) == len(starts) * 15 and measured[5] == parts[1]
    assert [float(measured[i]) for i in (2, 3)] == pytest.approx([loss(m, windows) for m in (model, new)], abs=1e-4)


def test_several_budgets_share_one_pass(model):
    planned = run_here("kron_decompose.py", *NUMBERS, "--budget=20K,80%", "--plan_only=True")
    assert planned.returncode == 0 and [path.name for path in Path("checkpoints").iterdir()] == ["plan.png"]
    total = model.count_parameters()["total"]
    rows = re.findall(r"^ +(20K|80%) +([\d.]+)% +([\d.e-]+) ", planned.stdout, re.M)
    assert [row[:2] for row in rows] == [("20K", f"{20_000 / total:.1%}"[:-1]), ("80%", "80.0")]
    done = succeed("kron_decompose.py", *NUMBERS, "--budget=20K,80%")
    assert re.findall(r"added \(predicted, order only: ([\d.e-]+)\)", done.stdout) == [loss for *_, loss in rows]
    alone = run_here("kron_decompose.py", *NUMBERS, "--budget=20K", "--out=alone.pt")
    assert alone.returncode == 0
    one, other = (checkpoint.load(path)[0] for path in ("alone.pt", "checkpoints/best_20K.pt"))
    assert one.config == other.config and all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))
    assert 0.79 * total < checkpoint.load("checkpoints/best_80%.pt")[0].count_parameters()["total"] <= 0.8 * total


def test_peers_even_ranks(model):
    """Without text the plain SVD; with text fitted to it, where all errors count alike."""
    for options in [], NUMBERS[1:]:
        succeed("experiments/peers.py", "even_ranks", "20K", NUMBERS[0], "--out=a.pt", *options)
        new = checkpoint.load("a.pt")[0]
        assert 19_000 < new.count_parameters()["total"] <= 20_000
        expected = factorize(model, new.config.shapes)
        if options:
            calibration.calibrate(model, expected, data.calibration_text("pattern", 1024, model.config, "cpu"))
        for (_, _, old), (_, _, matrix), (_, name, other) in zip(model.matrices(), new.matrices(), expected.matrices()):
            torch.testing.assert_close(matrix.weight, other.weight, rtol=0, atol=1e-5)
            W, r = old.weight.detach().numpy(), len(matrix.A)
            assert r * (sum(W.shape) - r) / W.size == pytest.approx(0.42, abs=0.06), name
            if not options:
                U, sigma, V = np.linalg.svd(W)
                np.testing.assert_allclose(matrix.weight.detach(), U[:, :r] * sigma[:r] @ V[:r], atol=1e-5)
