"""narrow.py against numpy's SVD, plain loops of least squares, and plain attention."""
import itertools

import numpy as np
import pytest
import torch
from conftest import random_matrix, square_root

from kronygpt import narrow
from model import CausalSelfAttention, Embedding, KronyGPTConfig


def positive(n, seed):
    A = random_matrix(2 * n, n, seed)
    return A.T @ A / (2 * n)


def tail_sums(sigma):  # ½ Σ_{i>k} σ_i², k = 0, 1, ...
    return [0.5 * np.square(sigma[k:]).sum() for k in range(len(sigma) + 1)]


C, H, N = 6, 2, 40
D_HEAD = C // H


@pytest.fixture
def attention():
    """A random attention in float64, tokens' inputs (N, C), Fisher matrices, and their HeadBases."""
    torch.manual_seed(0)
    attn = CausalSelfAttention(KronyGPTConfig(n_head=H, n_embd=C, n_layer=1, block_size=N), 0).double()
    for p in attn.parameters():
        torch.nn.init.normal_(p)
    x, fisher, stream = random_matrix(N, C, 3), positive(3 * C, 4), positive(C, 5)
    return attn, x, fisher, stream


def bases_of(attn, x, fisher, stream):
    """The HeadBases, and the inputs (N, C) of c_proj."""
    seen = []
    hook = attn.c_proj.register_forward_hook(lambda matrix, inputs, output: seen.append(inputs[0][0]))
    attn(x[None])
    hook.remove()
    covariances = (torch.cov(v.detach().T, correction=0) for v in (x, seen[0]))
    weights = (p.detach() for p in (attn.c_attn.weight, attn.c_attn.bias, attn.c_proj.weight))
    return narrow.head_bases(*weights, H, x.mean(0), *covariances, fisher, stream), seen[0].detach()


def test_queries_and_keys_are_the_svd_of_their_product_in_the_metric(attention):
    """Beside one SVD of the whole bilinear form x W_q W_kᵀ yᵀ, with the biases in it, where the keys' inputs have the second
    moments K."""
    attn, x, fisher, stream = attention
    W = torch.cat((attn.c_attn.weight, attn.c_attn.bias[None])).detach()  # inputs [x, 1]
    inputs = torch.cat((x, torch.ones(N, 1)), 1).double()
    K = positive(C + 1, 6)
    W_q, W_k = (W[:, part * C:(part + 1) * C].unflatten(1, (H, D_HEAD)).transpose(0, 1) for part in (0, 1))
    for h in range(H):
        columns = slice(h * D_HEAD, (h + 1) * D_HEAD)
        fisher[columns, columns] = W_k[h].T @ K @ W_k[h]
    bases, _ = bases_of(attn, x, fisher, stream)
    S = square_root(inputs.T @ inputs / N)
    for h in range(H):
        sigma = np.linalg.svd(S @ (W_q[h] @ W_k[h].T).numpy() @ square_root(K), compute_uv=False)[:D_HEAD]
        np.testing.assert_allclose(bases.qk_costs[h], tail_sums(sigma), rtol=1e-6, atol=1e-9)


def test_values_and_output_cost_what_their_errors_cost(attention):
    attn, x, fisher, stream = attention
    bases, seen = bases_of(attn, x, fisher, stream)
    for h, s in itertools.product(range(H), range(D_HEAD + 1)):
        o, W = (v[h * D_HEAD:(h + 1) * D_HEAD] for v in (seen.T, attn.c_proj.weight.detach()))
        e = (o - o.mean(1, keepdim=True)).T @ (torch.eye(D_HEAD) - bases.vo[0][h, :, :s] @ bases.vo[1][h, :, :s].T) @ W
        cost = torch.einsum("ti,ij,tj->", e, stream, e).item() / N / 2
        assert cost == pytest.approx(bases.vo_costs[h, s].item(), abs=1e-9)


@pytest.mark.parametrize("head_qk, head_v", [([D_HEAD] * H, [D_HEAD] * H), ([2, 1], [D_HEAD] * H), ([D_HEAD] * H, [1, 2]),
                                             ([1, D_HEAD], [2, 2])])
def test_narrower_heads_that_lose_nothing_are_the_same_function(attention, head_qk, head_v):
    """Heads whose queries and keys, and values, really have that rank."""
    attn, x, fisher, stream = attention
    W, b = attn.c_attn.A.data[0], attn.c_attn.bias.data
    for h in range(H):
        for part, rank in (0, head_qk[h]), (2, head_v[h]):
            columns = slice(part * C + h * D_HEAD, part * C + (h + 1) * D_HEAD)
            project = random_matrix(D_HEAD, rank, h + part) @ random_matrix(rank, D_HEAD, h + part + 9)
            W[:, columns], b[columns] = W[:, columns] @ project, b[columns] @ project
    expected = attn(x[None])[0]
    T, D = narrow.head_maps(bases_of(attn, x, fisher, stream)[0], head_qk, head_v)
    if head_qk == [D_HEAD] * H:  # nothing is rotated
        assert torch.equal(T[:2 * C, :2 * C], torch.eye(2 * C, dtype=torch.double))
    parts, y = (x @ (W @ T) + b @ T).split([*head_qk, *head_qk, *head_v], 1), []
    for h in range(H):
        scores = parts[h] @ parts[H + h].T / D_HEAD**0.5  # the scale of the wide head
        y.append(scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1) @ parts[2 * H + h])
    D_v = D[2 * C:, 2 * sum(head_qk):]
    found = torch.cat(y, 1) @ (D_v.T @ attn.c_proj.weight) + attn.c_proj.bias
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("panel", [1, 4, 64])
def test_brain_surgeon_drops_what_a_loop_of_least_squares_drops(panel, monkeypatch):
    monkeypatch.setattr(narrow, "PANEL", panel)
    n, C = 9, 4
    W, G, F = random_matrix(n, C, 1), positive(n, 2), positive(C, 3)
    ridged = G + narrow.RIDGE * G.diagonal().mean() * torch.eye(n)

    def loss_without(dropped):
        """Of the least squares that the kept units make up for it with, on inputs X with XᵀX = ridged."""
        X, R, V = np.linalg.cholesky(ridged.numpy()).T, np.linalg.cholesky(F.numpy()), W.numpy()
        kept = [j for j in range(n) if j not in dropped]
        best = np.linalg.lstsq(X[:, kept], X @ V, rcond=None)[0]
        if kept:
            np.testing.assert_allclose(narrow.without_units(W, G, kept), best, atol=1e-9)
        return 0.5 * np.square((X @ V - X[:, kept] @ best) @ R).sum()

    order, costs = narrow.brain_surgeon(W, G, F)
    dropped = []
    for step in range(n):
        losses = {j: loss_without([*dropped, j]) for j in range(n) if j not in dropped}
        dropped.append(min(losses, key=losses.get))
        assert order[step] == dropped[-1] and costs[step + 1].item() == pytest.approx(losses[dropped[-1]], rel=1e-6)
    assert costs[0] == 0


def test_heads_get_the_columns_that_cost_least():
    """Beside all widths that have the same sum."""
    costs = torch.tensor([[9.0, 5, 2, 1, 0], [8, 1, 0.5, 0.1, 0], [30, 20, 11, 4, 0]])
    for total in range(3, 13):
        best = min((w for w in itertools.product(range(1, 5), repeat=3) if sum(w) == total),
                   key=lambda widths: sum(costs[h, w].item() for h, w in enumerate(widths)))
        assert narrow.head_widths(costs, total) == list(best)


def test_an_embedding_of_low_rank_is_the_best_in_its_metric():
    E, weights, M = random_matrix(10, 4, 1), random_matrix(10, 1, 2)[:, 0].abs(), positive(4, 3)
    stairs = narrow.Staircase(E, weights, M)
    blended = 0.99 * M + 0.01 * M.diagonal().mean() * torch.eye(4, dtype=torch.double)
    sigma = np.linalg.svd((weights.sqrt()[:, None] * E).numpy() @ square_root(blended), compute_uv=False)
    options = stairs.options()
    assert [size for _, size, _ in options] == [13, 24, 40]  # rank 3 would take 42 multiply-adds
    for r, (bands, _, loss) in zip((1, 2, 4), options):
        found = stairs.tensors(bands)
        e = E - (found["weight"] if r == 4 else found["A"].view(10, r) @ found["B"])
        assert torch.einsum("v,vi,ij,vj->", weights, e, blended, e).item() / 2 == pytest.approx(loss, abs=1e-12)
        assert loss == pytest.approx(tail_sums(sigma)[r], abs=1e-12)


def test_staircases_cost_what_an_explicit_embedding_costs():
    E, weights, M = random_matrix(60, 6, 1), random_matrix(60, 1, 2)[:, 0].abs()**3, positive(6, 3)
    stairs = narrow.Staircase(E, weights, M, 4)
    blended = 0.99 * M + 0.01 * M.diagonal().mean() * torch.eye(6, dtype=torch.double)
    options = stairs.options()
    sizes, losses = ([option[i] for option in options] for i in (1, 2))
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True) and options[-1] == ([(60, 6)], 360, 0.0)
    assert any(len(bands) == 4 for bands, *_ in options)
    even = stairs.options(2)
    assert even[-1] == options[-1] and not any(k % 2 for bands, *_ in even for _, k in bands)
    assert any(len(bands) == 4 for bands, *_ in even)
    for bands, size, loss in options[:-1] + even[:-1]:
        embedding = Embedding(60, 6, bands).double()
        found = stairs.tensors(bands)
        assert found.keys() == embedding.state_dict().keys()
        embedding.load_state_dict(found)
        assert embedding.count_parameters() == size
        e = E - embedding.dense().detach()
        assert torch.einsum("v,vi,ij,vj->", weights, e, blended, e).item() / 2 == pytest.approx(loss, abs=1e-12)
        if len(bands) == 4:  # frequent tokens come first
            assert weights[embedding.row < 15].min() >= weights[embedding.row >= 15].max()
