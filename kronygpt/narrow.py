"""Narrower models: heads of fewer columns, MLPs of fewer hidden units, embeddings of lower rank. For each, what every width
costs and the weights that go with it.

All costs are second-order: an error e in an activation at one token adds about ½ e F eᵀ to the loss, where F holds second
moments of the loss's gradient there (calibration.statistics). Everything is float64.
"""
from dataclasses import dataclass

import torch

RIDGE = 1e-3  # added to the covariance of hidden units, as a share of its mean diagonal
BLEND = 0.01  # share of the identity in the metric of an embedding
ROUNDING = 1e-12  # relative size of a number that counts as zero


def root(S):
    """R [..., n, n] with R Rᵀ = S for symmetric S [..., n, n] whose eigenvalues are at least 0, but for rounding."""
    values, vectors = torch.linalg.eigh(S)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]


def tails(squares):
    """½ Σ_{i>k} σ_i² for k = 0, 1, ..., n of σ² [..., n]: what widths or ranks from 0 to n cost, [..., n + 1]."""
    sums = squares.flip(-1).cumsum(-1).flip(-1) / 2
    return torch.cat((sums, torch.zeros_like(sums[..., :1])), -1)


def dual_bases(moments, fisher):
    """The best subspaces for an activation x [n] that meets another one in a product x · y, such as a query and its keys.

    With the first s columns of T and of D, (x T) · (y D) is the product of y with x T Dᵀ. No projection of rank s has a
    smaller ½ E[e F eᵀ] for the error e = x − x T Dᵀ. It is that of the singular value decomposition R_xᵀ R_F = U Σ Vᵀ, where
    R_x and R_F are roots of the two matrices: T = R_F V Σ^(−1/2), D = R_x U Σ^(−1/2), Tᵀ D = I.

    Args:
        moments: [..., n, n], second moments of x.
        fisher: F [..., n, n].

    Returns:
        T [..., n, n], D [..., n, n] and σ² [..., n], descending.
    """
    R_x, R_F = root(moments), root(fisher)
    U, sigma, Vh = torch.linalg.svd(R_x.mT @ R_F)
    scale = sigma.clamp(min=ROUNDING * sigma[..., :1].clamp(min=torch.finfo(sigma.dtype).tiny)).rsqrt()[..., None, :]
    return R_F @ Vh.mT * scale, R_x @ U * scale, sigma.square()


@dataclass
class HeadBases:
    """Bases for the heads of a block, columns in descending order of importance; width s takes the first s.

    qk = (T_q, T_k) and vo = (T_v, T_o), each T [n_head, d, d]; qk_costs and vo_costs [n_head, d + 1], loss in nats per token
    that each width of each head is predicted to add.
    """

    qk: tuple
    vo: tuple
    qk_costs: torch.Tensor
    vo_costs: torch.Tensor


def diagonal_blocks(S, n_head):
    """The n_head diagonal blocks [n_head, d, d] of S [n_head d, n_head d]."""
    d = len(S) // n_head
    return S.view(n_head, d, n_head, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def head_bases(W_attn, b_attn, W_proj, n_head, mean, covariance, head_covariance, fisher, stream_fisher):
    """Bases in which the heads of a block lose least when they become narrower (A3, arXiv 2505.12942, has such heads without
    the Fisher metric).

    Scores are q kᵀ, so only W_q W_kᵀ with the biases matters: queries are projected in the metric of the loss, and keys get
    the dual basis. Values and the output are alike, with the output of the attention for x.

    Args:
        W_attn: [C, 3 C] and b_attn [3 C], of c_attn.
        W_proj: [C, C], of c_proj.
        mean: [C] and covariance [C, C], of the inputs of c_attn.
        head_covariance: [C, C], of the inputs of c_proj.
        fisher: [3 C, 3 C], at the output of c_attn.
        stream_fisher: [C, C], at that of c_proj.

    Returns:
        HeadBases.
    """
    C = len(W_attn)
    W_q, mean_q = W_attn[:, :C], mean @ W_attn[:, :C] + b_attn[:C]
    queries = W_q.T @ covariance @ W_q + mean_q[:, None] * mean_q  # not centered: the bias is part of a query
    T_q, T_k, qk = dual_bases(*(diagonal_blocks(S, n_head) for S in (queries, fisher[:C, :C])))
    T_v, T_o, vo = dual_bases(*(diagonal_blocks(S, n_head) for S in (head_covariance, W_proj @ stream_fisher @ W_proj.T)))
    return HeadBases((T_q, T_k), (T_v, T_o), tails(qk), tails(vo))


def head_maps(bases, head_qk, head_v):
    """HeadBases at some widths as two matrices for all columns of c_attn: T, which narrows them, and its dual D.

        c_attn → W_attn T, b_attn T        c_proj → D_vᵀ W_proj, with D_v the columns and rows of the values
        metric of c_attn's output → Dᵀ F D        covariance of the heads' outputs → T_vᵀ G T_v

    Args:
        head_qk, head_v: widths of queries and keys, and of values; at the width of a head the basis is the identity.

    Returns:
        T and D [3 C, n_head (2 head_qk + head_v)]
    """
    maps = []
    for pair in (bases.qk, bases.qk[::-1], bases.vo):  # queries, keys, values
        width, full = head_v if pair is bases.vo else head_qk, pair[0].shape[1]
        maps.append([torch.block_diag(*(torch.eye(full, dtype=t.dtype, device=t.device) if width == full else t[:, :width]
                                        for t in side)) for side in pair])
    return tuple(torch.block_diag(*sides) for sides in zip(*maps))


def brain_surgeon(W, covariance, fisher):
    """The order in which the hidden units of an MLP are dropped by the optimal brain surgeon (B. Hassibi and D. G. Stork,
    1993), always the one that adds least when the others make up for it, and what that costs.

    Unit j costs ½ ‖W_j F^(1/2)‖² / (G⁻¹)_jj, and the others' rows become W − (G⁻¹)_:j W_j / (G⁻¹)_jj. About n³ (1 + C / n)
    operations for n units.

    Args:
        W: [n, C], of c_proj.
        covariance: G [n, n], of the hidden units; a ridge is added.
        fisher: F [C, C], at the output.

    Returns:
        order [n], the first is dropped first, and costs [n + 1], of dropping none, one, two, ...
    """
    n = len(W)
    inverse, Z, units = torch.cholesky_inverse(torch.linalg.cholesky(ridged(covariance))), W @ root(fisher), torch.arange(n)
    alive, order, costs = torch.ones(n, dtype=torch.bool, device=W.device), [], [0.0]
    for _ in range(n):
        pivots = inverse.diagonal()
        each = torch.where(alive, Z.square().sum(1) / pivots, torch.inf)
        j = int(each.argmin())
        order.append(units[j].item())
        costs.append(costs[-1] + each[j].item() / 2)
        alive[j] = False
        column = inverse[:, j] / pivots[j]
        Z -= column[:, None] * Z[j]
        inverse -= column[:, None] * inverse[j]
        if alive.sum() <= 7 * len(alive) // 8:  # what is left shrinks, and so does the work
            keep = alive.nonzero()[:, 0]
            inverse, Z, units, alive = inverse[keep][:, keep], Z[keep], units[keep.cpu()], alive[keep]
        else:
            inverse.diagonal()[j] = 1.0
    return torch.tensor(order), torch.tensor(costs, dtype=torch.float64)


def ridged(covariance):
    penalty = (RIDGE * covariance.diagonal().mean()).clamp(min=torch.finfo(covariance.dtype).tiny)
    return covariance + penalty * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


def without_units(W, covariance, kept):
    """The rows [len(kept), C] with which the kept hidden units make up best for the others. Args as in brain_surgeon()."""
    G = ridged(covariance)
    return torch.linalg.solve(G[kept][:, kept], G[kept] @ W)


def unit_metric(W_proj, stream_fisher, slopes):
    """The Fisher metric [n, n] at the output of c_fc that follows from that of the stream: (W F Wᵀ) ∘ E[s sᵀ], with s the
    slopes of gelu, for W_proj [n, C] and slopes [n, n]."""
    return W_proj @ stream_fisher @ W_proj.T * slopes


def embedding_factors(E, weights, metric):
    """An embedding as a product of low rank that costs least when row v counts w_v: ½ Σ_v w_v e_v M e_vᵀ.

    wte is used twice. As input, an error in row v costs ½ f_v e F eᵀ, with the frequency f_v of the token and F at the sum
    of the embeddings. As output it costs about ½ p_v e E[h hᵀ] eᵀ, with the mean probability p_v of the token and the final
    hidden states h. Together that is about w = (f + p) / 2 and M = F + E[h hᵀ].

    Args:
        E: [V, C].
        weights: w [V].
        metric: M [C, C]; a share of the identity is blended in.

    Returns:
        A [V, C] and B [C, C], of which rank r takes the first r columns and rows, and costs [C + 1] of the ranks from 0.
    """
    mean = metric.diagonal().mean()
    M = (1 - BLEND) * metric + BLEND * mean * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    R = torch.linalg.cholesky(M)  # M = R Rᵀ
    squares, V = torch.linalg.eigh(R.T @ (E.T @ (weights[:, None] * E)) @ R)
    V = V.flip(1)
    return E @ R @ V, torch.linalg.solve_triangular(R, V.T, upper=False, left=False), tails(squares.clamp(min=0).flip(0))
