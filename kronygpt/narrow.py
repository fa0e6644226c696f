"""Narrower models: heads of fewer columns, MLPs of fewer hidden units, embeddings of lower rank. For each, what every width
costs and the weights that go with it.

All costs are second-order: an error e in an activation at one token adds about ½ e F eᵀ to the loss, where F holds second
moments of the loss's gradient there (calibration.statistics). Everything is float64.
"""
import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kronygpt.device import float64
from model import ALIGNED, KINDS, KronyGPT, Shape

RIDGE = 1e-3  # added to the covariance of hidden units, as a share of its mean diagonal
HEAD_STEPS, HIDDEN_STEPS = 8, 32  # widths that are tried, of a head and of an MLP
PANEL = 64  # hidden units that are dropped between two products of whole matrices
N_BANDS, STAIRCASES = 16, 64  # bands of tokens by frequency, and staircases over them that are tried
BLEND = 0.01  # share of the identity in the metric of an embedding
ROUNDING = 1e-12  # relative size of a number that counts as zero


def root(S):
    """R [..., n, n] with R Rᵀ = S for symmetric S [..., n, n] whose eigenvalues are at least 0, but for rounding."""
    values, vectors = torch.linalg.eigh(S)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]


def spectrum(W, covariance, fisher):
    """The squared singular values [min(m, n)], descending, of G^(1/2) W F^(1/2) for W [m, n], G [m, m] and F [n, n]."""
    if len(W) <= W.shape[1]:
        W = root(covariance).T @ W
        return squares(W @ fisher @ W.T)
    W = W @ root(fisher)
    return squares(W.T @ covariance @ W)


def squares(S):
    """The eigenvalues of S, which are at least 0 but for rounding, in descending order."""
    return torch.linalg.eigvalsh(S).clamp(min=0).flip(0)


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


HeadBases = namedtuple("HeadBases", "qk vo qk_costs vo_costs")  # as in head_bases()


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
        HeadBases: qk = (T_q, T_k) and vo = (T_v, T_o), each T [n_head, d, d] with columns in descending order of importance,
        of which width s takes the first s; qk_costs and vo_costs [n_head, d + 1], the loss in nats per token that each width
        of each head is predicted to add.
    """
    C = len(W_attn)
    W_q, mean_q = W_attn[:, :C], mean @ W_attn[:, :C] + b_attn[:C]
    queries = W_q.T @ covariance @ W_q + mean_q[:, None] * mean_q  # not centered: the bias is part of a query
    T_q, T_k, qk = dual_bases(*(diagonal_blocks(S, n_head) for S in (queries, fisher[:C, :C])))
    T_v, T_o, vo = dual_bases(*(diagonal_blocks(S, n_head) for S in (head_covariance, W_proj @ stream_fisher @ W_proj.T)))
    return HeadBases((T_q, T_k), (T_v, T_o), tails(qk), tails(vo))


def head_widths(costs, total):
    """The widths of the heads of a block, at least 1, that sum up to `total` and cost least, for costs [n_head, d + 1]."""
    gains = (costs[:, :-1] - costs[:, 1:])[:, 1:]  # of the second column, of the third, ...: they fall
    n_head, columns = gains.shape
    heads = gains.flatten().argsort(descending=True, stable=True)[:total - n_head] // max(columns, 1)
    return (1 + torch.bincount(heads, minlength=n_head)).tolist()


def head_maps(bases, head_qk, head_v):
    """HeadBases at some widths as two matrices for all columns of c_attn: T, which narrows them, and its dual D.

        c_attn → W_attn T, b_attn T        c_proj → D_vᵀ W_proj, with D_v the columns and rows of the values
        metric of c_attn's output → Dᵀ F D        covariance of the heads' outputs → T_vᵀ G T_v

    Args:
        head_qk, head_v: [n_head], widths of queries and keys, and of values; at full width a basis is the identity.

    Returns:
        T and D [3 C, Σ (2 head_qk + head_v)]
    """
    maps = []
    for pair in (bases.qk, bases.qk[::-1], bases.vo):  # queries, keys, values
        widths = head_v if pair is bases.vo else head_qk
        maps.append([torch.block_diag(*(torch.eye(width, dtype=t.dtype, device=t.device) if width == len(t) else t[:, :width]
                                        for t, width in zip(side, widths))) for side in pair])
    return tuple(torch.block_diag(*sides) for sides in zip(*maps))


def brain_surgeon(W, covariance, fisher):
    """The order in which the hidden units of an MLP are dropped by the optimal brain surgeon (B. Hassibi and D. G. Stork,
    1993), always the one that adds least when the others make up for it, and what that costs.

    Unit j costs ½ ‖W_j F^(1/2)‖² / (G⁻¹)_jj, and the others' rows become W − (G⁻¹)_:j W_j / (G⁻¹)_jj. Rows and inverse are
    updated for PANEL units at a time. About n² (n + C) operations for n units.

    Args:
        W: [n, C], of c_proj.
        covariance: G [n, n], of the hidden units; a ridge is added.
        fisher: F [C, C], at the output.

    Returns:
        order [n], the first is dropped first, and costs [n + 1], of dropping none, one, two, ...
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged(covariance)))
    Z, units = W @ root(fisher), torch.arange(len(W))
    order, costs = [], [0.0]
    while len(units):
        norms, pivots, alive = Z.square().sum(1), inverse.diagonal().clone(), torch.ones_like(Z[:, 0], dtype=torch.bool)
        U, V = Z.new_zeros(len(Z), PANEL), Z.new_zeros(PANEL, Z.shape[1])  # inverse - U Uᵀ and Z - U V are those of now
        for k in range(min(PANEL, len(units))):
            each = torch.where(alive, norms / pivots, torch.inf)
            j = int(each.argmin())
            order.append(units[j].item())
            costs.append(costs[-1] + each[j].item() / 2)
            alive[j], scale = False, pivots[j].sqrt()
            z, u = Z[j] - U[j] @ V, (inverse[:, j] - U @ U[j]) / scale
            norms = (norms + u / scale * (u / scale * (z @ z) - 2 * (Z @ z - U @ (V @ z)))).clamp(min=0)
            pivots = pivots - u.square()
            U[:, k], V[k] = u, z / scale
        left = alive.nonzero()[:, 0]
        U, units = U[left], units[left.cpu()]
        inverse, Z = inverse[left][:, left] - U @ U.T, Z[left] - U @ V
    return torch.tensor(order), torch.tensor(costs, dtype=torch.float64)


def ridged(covariance):
    penalty = (RIDGE * covariance.diagonal().mean()).clamp(min=torch.finfo(covariance.dtype).tiny)
    return covariance + penalty * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


def without_units(W, covariance, kept):
    """The rows [len(kept), C] with which the kept hidden units make up best for the others. Args as in brain_surgeon()."""
    G = ridged(covariance)
    return torch.linalg.solve(G[kept][:, kept], G[kept] @ W)


class Staircase:
    """An embedding E [V, C] in the basis in which a rank costs least, and what staircases of it cost.

    wte is used twice. As input, an error e in row v costs ½ f_v e F eᵀ, with the frequency f_v of the token and F at the sum
    of the embeddings. As output it costs about ½ p_v e E[h hᵀ] eᵀ mean(1 - p), with the mean probability p_v of the token
    and the final hidden states h. Together that is about ½ w_v e M eᵀ with w = (f + p) / 2, M = F + E[h hᵀ] mean(1 - p). All
    rows share one basis, the eigenvectors of the weighted rows in that metric; a band of rare tokens takes fewer of them
    than the others. (GroupReduce, arXiv 1806.06950, has a basis for each band.)

    Args:
        E: [V, C].
        weights: w [V].
        metric: M [C, C]; a share of the identity is blended in.
        n_bands: bands of rows by their weights, at most; 1 leaves the rows in their order.
    """

    def __init__(self, E, weights, metric, n_bands=1):
        self.E, mean = E, metric.diagonal().mean()
        R = torch.linalg.cholesky((1 - BLEND) * metric + BLEND * mean * torch.eye(len(metric)).to(metric))  # R Rᵀ = M
        self.order = weights.argsort(descending=True, stable=True) if n_bands > 1 else torch.arange(len(E), device=E.device)
        E, weights = float64(E[self.order]), weights[self.order]
        directions = torch.linalg.eigh(R.T @ (E.T @ (weights[:, None] * E)) @ R).eigenvectors.flip(1)
        self.A = E @ (R @ directions)  # (V, C)
        self.B = torch.linalg.solve_triangular(R, directions.T, upper=False, left=False)  # (C, C), E = A B
        size = math.ceil(len(E) / n_bands / ALIGNED) * ALIGNED  # of all bands but the last one
        bands = self.A.split(size)
        self.rows = [len(band) for band in bands]
        self.squares = torch.stack([w @ band.square() for w, band in zip(weights.split(size), bands)])
        scale = (self.B.norm(dim=1) / self.A.norm(dim=0).clamp(min=torch.finfo(E.dtype).tiny)).sqrt()
        self.A *= scale  # training then changes both sides alike
        self.B /= scale[:, None]

    def options(self, step=1):
        """[(bands, size, predicted loss)], sizes rising and losses falling: ranks and staircases in multiples of `step`, and
        the dense embedding."""
        (V, C), found, losses = self.E.shape, [], tails(self.squares.sum(0)).tolist()
        found += [([(V, r)], r * (V + C - r), losses[r]) for r in range(step, largest_rank(V, C) + 1, step)]
        if len(self.rows) > 1:
            rows, costs = torch.tensor(self.rows), tails(self.squares).cpu()
            prices = (self.squares.cpu() / 2 / rows[:, None]).flatten().sort().values  # at which a column is worth it
            for price in prices[torch.linspace(0, len(prices) - 1, STAIRCASES).long()]:
                columns = step + step * (costs + price * rows[:, None] * torch.arange(C + 1))[:, step::step].argmin(1)
                loss = costs.gather(1, columns[:, None]).sum().item()
                found.append(([*zip(self.rows, columns.tolist())], int(rows @ columns + columns.max() * C), loss))
        found.append(([(V, C)], V * C, 0.0))
        best, least = [], torch.inf
        for option in sorted(found, key=lambda option: option[1:]):
            if option[2] < least and option[1] <= V * C:
                best.append(option)
                least = option[2]
        return best

    def tensors(self, bands):
        """{name: tensor} of a model.Embedding in these bands."""
        if bands == [tuple(self.E.shape)]:
            return {"weight": self.E}
        if len(bands) == 1:  # the rows keep their order
            return {"A": self.A[self.order.argsort(), :bands[0][1]].flatten(), "B": self.B[:bands[0][1]]}
        parts = self.A.split([n for n, _ in bands])
        return {"A": torch.cat([part[:, :k].flatten() for part, (_, k) in zip(parts, bands)]),
                "B": self.B[:max(k for _, k in bands)], "row": self.order.argsort()}


# ----------------------------------------------------------------------------------------------------------------------
# the widths of a block, what each of them costs, and the block that has it

class Table(NamedTuple):
    """What a matrix or an embedding can become: parameters, which rise from row to row, and losses, which fall."""

    sizes: torch.Tensor
    losses: torch.Tensor
    option: Callable  # of a row: the Shape of a matrix, or the bands of a model.Embedding


def rank_table(m, n, squares, step=1):
    """The Table of a matrix [m, n] at rank `step`, 2 `step`, ... and dense, with the σ² of spectrum(). Each rank is stored
    once: r (m + n - r) numbers."""
    ranks = torch.arange(step, max(step, largest_rank(m, n) + 1), step)
    sizes = torch.cat((ranks * (m + n - ranks), torch.tensor([m * n])))
    losses = torch.cat((tails(squares.cpu())[ranks], torch.zeros(1, dtype=torch.float64)))

    def shape(row):
        return Shape(m, 1, ranks[row].item()) if row < len(ranks) else Shape(m, n, 1)

    return Table(sizes, losses, shape)


def largest_rank(m, n):
    """The largest rank r of a matrix [m, n] that is tried: beyond it a token takes more multiply-adds, r (m + n), than with
    the dense matrix. (On gpt2-bytes at 1.716M that raises the predicted loss by 0.0001, at 0.931M not at all.)"""
    return m * n // (m + n)


@dataclass
class Choice:
    """One way to make a part of a model.

    widths: {"head_qk": [of each head], "head_v": [of each head]}, {"n_inner": number} or {}.
    size, loss: parameters, those of biases, and predicted loss in nats per token that it has in any case.
    tables: {kind, "wte" or "wpe": Table} of each matrix or embedding whose rank is free.
    """

    widths: dict
    size: int
    loss: float
    tables: dict


def grid(width, steps):
    """About `steps` widths, evenly spaced, up to a width."""
    step = max(1, width // steps)
    return [*range(step, width, step), width]


class Block:
    """The matrices of a block of a dense KronyGPT with its calibration.Statistics, in float64, and what narrows them, with
    ranks in multiples of `step`.

    b, F, G, mean: {kind: bias, Fisher metric of the output, covariance and mean of the input}.
    """

    def __init__(self, model, layer, statistics, step=1):
        self.config, self.model, self.step = model.config, model, step
        self.names = names = {kind: f"transformer.h.{layer}.{kind}" for kind in KINDS}
        self.b = {kind: float64(model.get_submodule(name).bias.detach()) for kind, name in names.items()}
        self.F, self.mean, self.G = ({kind: of_all[name] for kind, name in names.items()} for of_all in (
            statistics.fisher, statistics.means, statistics.covariances))
        self.bases = self.order = None

    def W(self, kind):  # made anew, since those of all blocks take twice the memory of the model
        return float64(self.model.get_submodule(self.names[kind]).weight.detach())

    def attention(self, is_narrowed):
        """Choices for the heads at all multiples of an eighth of their mean width, or at their own only. Each head has the
        share of it that costs least."""
        head, H, C = self.config.head_dim, self.config.n_head, self.config.n_embd
        W, F = self.W("attn.c_attn"), self.F["attn.c_attn"]
        self.bases = bases = head_bases(W, self.b["attn.c_attn"], self.W("attn.c_proj"), H, self.mean["attn.c_attn"],
                                        self.G["attn.c_attn"], self.G["attn.c_proj"], F, self.F["attn.c_proj"])
        T = torch.block_diag(*bases.qk[0], *bases.qk[1], *bases.vo[0])  # in which narrower heads take the first columns
        D = torch.block_diag(*bases.qk[1], *bases.qk[0], *bases.vo[1])
        W, F = root(self.G["attn.c_attn"]).T @ (W @ T), D.T @ F @ D
        W_proj = D[2 * C:, 2 * C:].T @ self.W("attn.c_proj") @ root(self.F["attn.c_proj"])
        G = T[2 * C:, 2 * C:].T @ self.G["attn.c_proj"] @ T[2 * C:, 2 * C:]

        def columns(widths):  # of C, that heads of some widths keep
            return torch.cat([h * head + torch.arange(width) for h, width in enumerate(widths)]).to(W.device)

        totals, heads, result = [H * width for width in grid(head, HEAD_STEPS)] if is_narrowed else [H * head], range(H), []
        of_qk, of_v = ([head_widths(costs, n) for n in totals] for costs in (bases.qk_costs, bases.vo_costs))
        in_qk = [torch.cat((columns(widths), C + columns(widths))) for widths in of_qk]
        S_qk = [W[:, at] @ F[at][:, at] @ W[:, at].T for at in in_qk]
        for n_v, v in zip(totals, of_v):
            at_v = columns(v)
            proj = rank_table(n_v, C, squares(W_proj[at_v].T @ G[at_v][:, at_v] @ W_proj[at_v])[:n_v], self.step)
            FW = F[:, 2 * C + at_v] @ W[:, 2 * C + at_v].T  # (3 C, C)
            S_v = W[:, 2 * C + at_v] @ FW[2 * C + at_v]
            for n_qk, qk, at, S in zip(totals, of_qk, in_qk, S_qk):
                cross = W[:, at] @ FW[at]
                S = S + cross + cross.T + S_v  # W F Wᵀ of these columns
                attn = rank_table(C, 2 * n_qk + n_v, squares(S)[:2 * n_qk + n_v], self.step)
                loss = bases.qk_costs[heads, qk].sum() + bases.vo_costs[heads, v].sum()
                result.append(Choice(dict(head_qk=qk, head_v=v), 2 * n_qk + n_v + C, float(loss),
                                     {"attn.c_attn": attn, "attn.c_proj": proj}))
        return result

    def mlp(self, is_narrowed):
        """Choices for the hidden units at all multiples of a 32nd of their number, or with all of them only."""
        W, G, C = self.W("mlp.c_proj"), self.G["mlp.c_proj"], self.config.n_embd
        n = len(W)
        self.order, costs = torch.arange(n), torch.zeros(n + 1)
        if is_narrowed:
            self.order, costs = brain_surgeon(W, G, self.F["mlp.c_proj"])
        last = self.order.flip(0)  # dropped last comes first, so that a width's matrices begin with a narrower one's
        W_fc, F = root(self.G["mlp.c_fc"]).T @ self.W("mlp.c_fc")[:, last], self.F["mlp.c_fc"][last][:, last]
        W_proj = W[last] @ root(self.F["mlp.c_proj"])
        G, Y = G[last][:, last], None
        if is_narrowed:  # what without_units() makes of W, but for the ridge, comes from the first rows of Y for any width
            Y = torch.linalg.solve_triangular(torch.linalg.cholesky(ridged(G)), G @ W_proj, upper=False)
        result, S_fc, S_proj, done = [], 0, 0, 0
        for width in grid(n, HIDDEN_STEPS) if is_narrowed else [n]:
            new, old, done = slice(done, width), slice(0, done), width
            cross = W_fc[:, new] @ (F[new, old] @ W_fc[:, old].T)
            S_fc = S_fc + cross + cross.T + W_fc[:, new] @ F[new, new] @ W_fc[:, new].T
            S_proj = S_proj + Y[new].T @ Y[new] if width < n else W_proj.T @ G @ W_proj
            result.append(Choice(dict(n_inner=width), width + C, float(costs[n - width]), {
                "mlp.c_fc": rank_table(C, width, squares(S_fc)[:width], self.step),
                "mlp.c_proj": rank_table(width, C, squares(S_proj)[:width], self.step)}))
        return result

    def kept(self, width):
        return self.order[len(self.order) - width:].sort().values

    def output(self, kept):
        W = self.W("mlp.c_proj")
        return W if len(kept) == len(W) else without_units(W, self.G["mlp.c_proj"], kept)

    def narrowed(self, head_qk, head_v, n_inner):
        """{kind: (weight, bias, Fisher metric of the output)} in these widths."""
        (T, D), kept = head_maps(self.bases, head_qk, head_v), self.kept(n_inner)
        D_v, W, b, F = D[2 * self.config.n_embd:, 2 * sum(head_qk):], self.W, self.b, self.F
        return {"attn.c_attn": (W("attn.c_attn") @ T, b["attn.c_attn"] @ T, D.T @ F["attn.c_attn"] @ D),
                "attn.c_proj": (D_v.T @ W("attn.c_proj"), b["attn.c_proj"], F["attn.c_proj"]),
                "mlp.c_fc": (W("mlp.c_fc")[:, kept], b["mlp.c_fc"][kept], F["mlp.c_fc"][kept][:, kept]),
                "mlp.c_proj": (self.output(kept), b["mlp.c_proj"], F["mlp.c_proj"])}


@torch.no_grad()
def narrowed(dense, blocks, widths, embeddings, bands):
    """A dense KronyGPT in other widths, {"head_qk", "head_v", "n_inner": [of each block]}, with embeddings in other bands,
    {"wte" or "wpe": bands}, and the Fisher metrics {name: F} of its matrices' outputs.

    Args:
        dense: the KronyGPT.
        blocks, embeddings: [Block] and {"wte" or "wpe": Staircase} of it.
    """
    state_dict, fisher, norm = dict(dense.state_dict()), {}, dense.transformer.ln_f.weight
    for name in bands:
        del state_dict[f"transformer.{name}.weight"]
        for part, t in embeddings[name].tensors(bands[name]).items():
            t = t.to(norm.device, torch.long if part == "row" else norm.dtype)
            state_dict[f"transformer.{name}.{part}"] = t.contiguous()
    for layer, block in enumerate(blocks):
        new = block.narrowed(*(widths[name][layer] for name in ("head_qk", "head_v", "n_inner")))
        for kind, (W, bias, F) in new.items():
            name = f"transformer.h.{layer}.{kind}"
            fisher[name] = F
            state_dict |= {f"{name}.A": W[None].to(norm), f"{name}.B": norm.new_ones(1, 1, 1), f"{name}.bias": bias.to(norm)}
    model_args = dict(dense.config.as_plain_types(), **widths, **bands, shapes={})
    return KronyGPT.from_state_dict(model_args, state_dict).eval(), fisher
