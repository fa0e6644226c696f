"""Least squares for one matrix: moments of activations, and the Kronecker sum that fits them in a metric.

For inputs X̂ [T, m], targets Y [T, n] and a metric M [n, n] of their errors, fit() minimizes

    tr[E M Eᵀ]      E = Y − X̂ Σ_f A_f ⊗ B_f − 1 bᵀ

from the moments X̂ᵀX̂ and X̂ᵀY alone, so that its memory does not depend on the number of tokens T. M is made of the second
moments F [n, n] of the loss's gradient at the outputs: an error counts as much as the loss feels it (Y. Hsu et al., Language
model compression with weighted low-rank factorization, arXiv 2207.00112, has a weight for each row in place of M).
"""
import math
from collections import namedtuple
from functools import cached_property

import torch
from torch.linalg import cholesky, solve_triangular

from kronygpt.device import float64, float64_device
from kronygpt.kron import balanced, column_side, leading_singular_vectors, rearrange, van_loan
from model import kron_weight

RIDGE = 1e-3  # pull towards the trained weights, as a share of the mean second moment of an input
BLEND = 0.1  # share of the identity in a metric; 0.02 to 0.5 do the same
POWER_STEPS = 20  # of the separable metric; more change nothing that matters
ALS_STEPS = 30  # steps of alternating least squares, at most
TOLERANCE = 1e-4  # relative gain of a step, below which they end
ROUNDING = 1e-12  # relative size of a number that counts as zero in float64
GRAM_COLUMNS = 512  # columns of a strip of XᵀX


def gram(X):
    """XᵀX [m, m] for X (T, m), strip by strip: each strip begins at the diagonal, and the rest is its mirror image."""
    G = X.new_empty(X.shape[1], X.shape[1])
    for begin in range(0, len(G), GRAM_COLUMNS):
        strip = slice(begin, begin + GRAM_COLUMNS)
        G[strip, begin:] = X[:, strip].T @ X[:, begin:]
        G[begin + GRAM_COLUMNS:, strip] = G[strip, begin + GRAM_COLUMNS:].T
    return G


Centred = namedtuple("Centred", "mean_x mean_y G C variance")  # [m], [n], [m, m], [m, n], [n]: as in Moments.centred()


class Moments:
    """Means and centred second moments of inputs X [m] and targets Y [n] over any number of tokens: products of a batch in
    float32, relative to the first batch's means, summed up in float64, on the CPU where their device has none."""

    def __init__(self):
        self.count = 0

    def add(self, X, Y=None):
        """Add a batch of inputs X (T, m) and targets Y (T, n); default: no targets, n = 0."""
        Y = X[:, :0] if Y is None else Y
        if not self.count:
            self.origin = X.mean(0), Y.mean(0)
            m, n = X.shape[1], Y.shape[1]
            self.sums = [torch.zeros(shape, dtype=torch.float64, device=float64_device(X.device))
                         for shape in (m, n, (m, m), (m, n), n)]
        X, Y = X - self.origin[0], Y - self.origin[1]
        for total, part in zip(self.sums, (X.sum(0), Y.sum(0), gram(X), X.T @ Y, Y.square().sum(0))):
            total += part.to(total.device)
        self.count += len(X)

    def centred(self):
        """The Centred of all batches: means of X and Y, G = XᵀX / T, C = XᵀY / T, and the variances of the columns of Y."""
        x, y, G, C, yy = (total / self.count for total in self.sums)
        origin_x, origin_y = map(float64, self.origin)
        return Centred(x + origin_x, y + origin_y, G - x[:, None] * x, C - x[:, None] * y,
                       (yy - y.square()).clamp(min=0))


def targets_of(moments, W, bias):
    """The Centred of inputs X [m] and targets Z W + bias, from the Moments of X beside Z [2 m], without the targets: what
    the dense model's matrix W [m, n] makes of its own inputs Z."""
    m, W, mean, cov = len(W), float64(W), *moments.centred()[0:3:2]
    return Centred(mean[:m], mean[m:] @ W + float64(bias), cov[:m, :m], cov[:m, m:] @ W,
                   (W * (cov[m:, m:] @ W)).sum(0).clamp(min=0))


def metric(fisher, n, device):
    """M [n, n] = (1 − BLEND) F / (mean of F's diagonal) + BLEND I of the second moments F [n, n] of the loss's gradient at
    the outputs; I without them, and where they are 0."""
    M = torch.eye(n, dtype=torch.float64, device=device)
    if fisher is None or not (mean := fisher.diagonal().mean()):
        return M
    return BLEND * M + (1 - BLEND) / mean * fisher


class Problem:
    """The least squares of one matrix.

    Args:
        centred: the Centred of X̂ and Y.
        W: [m, n], the trained weights, towards which a ridge pulls. Where inputs never change, it alone decides.
        fisher: F [n, n], second moments of the loss's gradient at the outputs, for the metric M; None for M = I.
    """

    def __init__(self, centred, W, fisher=None):
        self.mean_x, self.mean_y, self.G, self.C, self.variance = centred
        self.W = float64(W)
        self.M = metric(fisher, self.W.shape[1], self.W.device)
        size = torch.maximum(RIDGE * self.G.diagonal().mean(), ROUNDING * self.mean_x.square().mean())  # above G's rounding
        penalty = torch.where(size > torch.finfo(size.dtype).tiny, size, 1.0)
        self.ridged_G = self.G + penalty * torch.eye(len(self.G), dtype=torch.float64, device=self.G.device)
        self.ridged_C = self.C + penalty * self.W

    @cached_property
    def root(self):  # L [m, m], lower, with L Lᵀ = ridged_G
        return cholesky(self.ridged_G)

    @cached_property
    def solution(self):  # [m, n], the best weights of all
        return torch.cholesky_solve(self.ridged_C, self.root)

    def error(self, W, bias=None):
        """Mean of (Y − X̂ W − b)² over tokens and columns, relative to the variance of Y; default: the best b."""
        W = float64(W)
        residual = self.variance - 2 * (W * self.C).sum(0) + (W * (self.G @ W)).sum(0)
        if bias is not None:
            residual = residual + (self.mean_y - self.mean_x @ W - float64(bias)).square()
        return share(residual.clamp(min=0).sum(), self.variance.sum())  # rounding of the moments can make it negative

    def objective(self, W, M_1, M_2):
        """What a fit minimizes, less its smallest value for any W: tr[Dᵀ ridged_G D (M_1 ⊗ M_2)] with D = W − solution."""
        D = float64(W) - self.solution
        weighted = M_1 @ D.view(-1, len(M_1), len(M_2)) @ M_2  # D (M_1 ⊗ M_2), for symmetric M_1 and M_2
        return (self.ridged_G @ D * weighted.view_as(D)).sum().item()

    def bias(self, W):
        """The best bias [n] for weights W."""
        return self.mean_y - self.mean_x @ float64(W)


def share(part, whole):
    """part / whole of two scalar tensors, a float; the part itself where the whole is 0."""
    return (part / whole).item() if whole else part.item()


def separable(M, n1):
    """M_1 [n1, n1] and M_2 [n2, n2], positive definite as M [n1 n2, n1 n2] is, with M_1 ⊗ M_2 nearest to M (Van Loan and
    Pitsianis, 1993): power iteration from the identity, whose steps keep symmetry and signs."""
    R = rearrange(M, n1, n1)  # (n1², n2²)
    M_2 = torch.eye(len(M) // n1, dtype=M.dtype, device=M.device).view(-1)
    for _ in range(POWER_STEPS):
        M_1 = R @ M_2 / M_2.square().sum()
        M_2 = R.T @ M_1 / M_1.square().sum()
    return M_1.view(n1, n1), M_2.view(len(M) // n1, -1)


def als_step(G, C, B, m1, M_2):
    """The best A [r, m1, n1] for a fixed B [r, m2, n2]: ordinary least squares whose normal matrix, over (factor, row of A),
    is the same for all columns of A.

    Args:
        G, C: [m1 m2, m1 m2] and [m1 m2, n1 n2], moments of the inputs and cross moments.
        M_2: [n2, n2], the metric of B's columns; that of A's columns does not matter.
    """
    r, m2, n2 = B.shape
    n1 = C.shape[1] // n2
    weighted = B @ M_2
    blocks = C.view(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
    target = (blocks @ weighted.flatten(1).T).view(m1, n1, r).permute(2, 0, 1).reshape(r * m1, n1)
    blocks = G.view(m1, m2, m1, m2).permute(0, 2, 1, 3).reshape(m1 * m1, m2 * m2)
    products = torch.einsum("fij,gkj->ikfg", weighted, B).reshape(m2 * m2, r * r)
    N = (blocks @ products).view(m1, m1, r, r).permute(2, 0, 3, 1).reshape(r * m1, r * m1)
    mean = N.diagonal().mean()  # factors that are alike make it singular, and those of a zero matrix zero
    N.diagonal().add_(torch.where(mean > 0, ROUNDING * mean, 1.0))
    return torch.cholesky_solve(target, cholesky(N)).view(r, m1, n1)


def reduced_rank(problem, r, A_is_column):
    """A [r, m, 1] and B [r, 1, n], or A [r, 1, n] and B [r, m, 1]: the exact least squares of rank r in the metric, one SVD
    between whitened inputs and outputs (reduced-rank regression; A. J. Izenman, 1975. SVD-LLM, arXiv 2403.07378, whitens the
    inputs)."""
    R = cholesky(problem.M)
    whitened = solve_triangular(problem.root, problem.ridged_C, upper=False) @ R  # (m, n), root.T @ solution @ R
    is_tall = len(whitened) > whitened.shape[1]
    vectors, image = leading_singular_vectors(whitened if is_tall else whitened.T, r)
    left, right = (image, vectors.T) if is_tall else (vectors, image.T)
    column = solve_triangular(problem.root.T, left, upper=True).T[:, :, None]  # (r, m, 1)
    row = solve_triangular(R, right, upper=False, left=False)[:, None, :]  # (r, 1, n)
    return balanced(column, row) if A_is_column else balanced(row, column)


def swapped(W, m1, n1, m2, n2):
    """W [m1 m2, n1 n2] with its indices in the order [m2 m1, n2 n1]: Σ_f B_f ⊗ A_f for W = Σ_f A_f ⊗ B_f."""
    return W.view(m1, m2, n1, n2).permute(1, 0, 3, 2).reshape(m1 * m2, n1 * n2)


def alternate(problem, A, B, steps=ALS_STEPS):
    """Alternating least squares from A [r, m1, n1] and B [r, m2, n2], in the separable metric that is nearest to M. The
    problem's objective never rises from step to step."""
    (_, m1, n1), (_, m2, n2) = A.shape, B.shape
    M_1, M_2 = separable(problem.M, n1)
    G, C = problem.ridged_G, problem.ridged_C
    swapped_G, swapped_C = swapped(G, m1, m1, m2, m2), swapped(C, m1, n1, m2, n2)
    last = math.inf
    for _ in range(steps):
        A = als_step(G, C, B, m1, M_2)
        B = als_step(swapped_G, swapped_C, A, m2, M_1)
        A, B = balanced(A, B)
        now = problem.objective(kron_weight(A, B), M_1, M_2)
        if now > (1 - TOLERANCE) * last:
            break
        last = now
    return A, B


def initial_factors(problem, dim_1, dim_2, r):
    """A [r, dim_1, dim_2] and B [r, m/dim_1, n/dim_2] to begin with: Van Loan's sum for the best weights of all, where
    moments of the inputs and metric are replaced by the nearest separable ones."""
    L, R = ([cholesky(side) for side in separable(*pair)] for pair in ((problem.ridged_G, dim_1), (problem.M, dim_2)))
    sides = van_loan(torch.kron(*L).T @ problem.solution @ torch.kron(*R), dim_1, dim_2, r)
    return [solve_triangular(R_i, solve_triangular(L_i.T, side, upper=True), upper=False, left=False)
            for L_i, R_i, side in zip(L, R, sides)]


def fit(problem, A, B, fixed_B=False):
    """The A [r, m1, n1] and B [r, m2, n2] of the shapes given that minimize a Problem of W [m1 m2, n1 n2], in float64: in
    closed form where they are of low rank or B stays (fixed_B), by alternating least squares otherwise."""
    r, m1, n1 = A.shape
    if fixed_B:
        B = float64(B)
        return als_step(problem.ridged_G, problem.ridged_C, B, m1, separable(problem.M, n1)[1]), B
    if A[0].numel() == problem.W.numel():  # dense
        return problem.solution[None], B
    if column_side(A.shape, B.shape):
        return reduced_rank(problem, r, A_is_column=n1 == 1)
    return alternate(problem, *initial_factors(problem, m1, n1, r))
