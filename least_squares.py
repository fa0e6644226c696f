"""Least squares for one matrix: moments of activations, and the Kronecker sum that fits them.

For inputs X̂ [T, m] and targets Y [T, n], fit() minimises

    ‖Y − X̂ Σ_f A_f ⊗ B_f − 1 bᵀ‖²

from the moments X̂ᵀX̂ and X̂ᵀY alone, so that its memory does not depend on the number of tokens T.
"""
import copy
import math

import torch

from configurator import UserError
from device import float64, float64_device
from kron import balanced, kron_weight, van_loan

RIDGE = 1e-3  # pull towards the trained weights, as a share of the mean second moment of an input
ALS_STEPS = 30  # steps of alternating least squares, at most
TOLERANCE = 1e-4  # relative gain of a step, below which they end
LARGEST_SYSTEM = 8192  # order of the largest normal matrix: 512 MB in float64
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


class Moments:
    """Means and centred second moments of inputs X [m] and targets Y [n] over any number of tokens, in float64.

    Products of a batch are in float32, relative to the first batch's means, and summed up in float64, on the CPU where
    their device has none; what follows from the sums stays there.
    """

    def __init__(self):
        self.count = 0

    def add(self, X, Y):
        """Add a batch of inputs X (T, m) and targets Y (T, n)."""
        if not self.count:
            self.origin = X.mean(0), Y.mean(0)
            m, n = X.shape[1], Y.shape[1]
            self.sums = [torch.zeros(shape, dtype=torch.float64, device=float64_device(X.device))
                         for shape in (m, n, (m, m), (m, n), n)]
        X, Y = X - self.origin[0], Y - self.origin[1]
        for total, part in zip(self.sums, (X.sum(0), Y.sum(0), gram(X), X.T @ Y, Y.square().sum(0))):
            total += part.to(total.device)
        self.count += len(X)

    def reordered(self, inputs=slice(None), targets=slice(None)):
        """The moments of X[:, inputs] and Y[:, targets]."""
        new = copy.copy(self)
        (x, y), (sum_x, sum_y, G, C, yy) = self.origin, self.sums
        new.origin = x[inputs], y[targets]
        new.sums = [sum_x[inputs], sum_y[targets], G[inputs][:, inputs], C[inputs][:, targets], yy[targets]]
        return new

    def centred(self):
        """(mean_x [m], mean_y [n], G [m, m], C [m, n], variance of Y [n]): G and C are averages over the tokens of the
        products of the centred X and Y."""
        x, y, G, C, yy = (total / self.count for total in self.sums)
        origin_x, origin_y = map(float64, self.origin)
        return (x + origin_x, y + origin_y, G - x[:, None] * x, C - x[:, None] * y,
                (yy - y.square()).clamp(min=0))


class Problem:
    """The least squares of one matrix: find A [r, m1, n1] and B [r, m2, n2].

    Args:
        moments: Moments of X̂ and Y.
        W: [m, n], the trained weights, towards which a ridge pulls.
        weights: [n], the cost of an error in each column; a cost of 0 is raised to a rounding error. Default: all alike,
            which they are also where all of them cost nothing.
        ridge: share of the mean second moment of an input. Inputs that never change tell nothing, and the ridge alone
            decides: the weights stay.
    """

    def __init__(self, moments, W, weights=None, ridge=RIDGE):
        self.mean_x, self.mean_y, self.G, self.C, self.variance = moments.centred()
        weights = torch.ones_like(self.variance) if weights is None else float64(weights)
        weights = weights / weights.mean() if weights.any() else torch.ones_like(weights)
        self.weights = weights.clamp(min=ROUNDING)
        self.W = float64(W)
        size = torch.maximum(ridge * self.G.diagonal().mean(), ROUNDING * self.mean_x.square().mean())  # above G's rounding
        self.penalty = torch.where(size > torch.finfo(size.dtype).tiny, size, 1.0)
        self.ridged_G = self.G + self.penalty * torch.eye(len(self.G), dtype=torch.float64, device=self.G.device)
        self.ridged_C = self.C + self.penalty * self.W

    def squared_errors(self, W):
        """Mean of (Y − X̂ W − b)² over the tokens, for each column [n], with the best b."""
        return self.variance - 2 * (W * self.C).sum(0) + (W * (self.G @ W)).sum(0)

    def error(self, W, bias=None):
        """Weighted mean of (Y − X̂ W − b)² over tokens and columns, relative to the variance of Y; default: the best b."""
        W = float64(W)
        residual = self.squared_errors(W)
        if bias is not None:
            residual = residual + (self.mean_y - self.mean_x @ W - float64(bias)).square()
        residual = residual.clamp(min=0)  # rounding of the moments can make it negative
        return share((self.weights * residual).sum(), (self.weights * self.variance).sum())

    def objective(self, W, weights):
        """The objective of a fit: the sum of the squared errors and the ridge, by columns, times their weights [n]."""
        W = float64(W)
        ridge = self.penalty * (W - self.W).square().sum(0)
        return (weights * (self.squared_errors(W) + ridge)).sum().item()

    def bias(self, W):
        """The best bias [n] for weights W."""
        return self.mean_y - self.mean_x @ float64(W)

    def separable_weights(self, n1, n2):
        """u [n1] and v [n2] such that u ⊗ v, which an ALS step can use, is near the columns' weights."""
        grid = self.weights.view(n1, n2)
        return grid.mean(1), grid.mean(0)


def share(part, whole):
    """part / whole of two scalar tensors, a float; the part itself where the whole is 0."""
    return (part / whole).item() if whole else part.item()


def als_step(G, C, B, m1, weights):
    """The best A for a fixed B: an ordinary least-squares problem whose normal matrix, over (factor, row of A), is the
    same for all columns of A.

    Args:
        G: [m1 m2, m1 m2], second moments of the inputs.
        C: [m1 m2, n1 n2], cross moments.
        B: [r, m2, n2].
        m1: rows of A.
        weights: [n2], of B's columns; those of A's columns do not matter.

    Returns:
        A [r, m1, n1]
    """
    r, m2, n2 = B.shape
    n1 = C.shape[1] // n2
    blocks = C.view(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
    weighted = (B * weights).permute(1, 2, 0).reshape(m2 * n2, r)
    target = (blocks @ weighted).view(m1, n1, r).permute(2, 0, 1).reshape(r * m1, n1)
    blocks = G.view(m1, m2, m1, m2).permute(0, 2, 1, 3).reshape(m1 * m1, m2 * m2)
    products = torch.einsum("fij,j,gkj->ikfg", B, weights, B).reshape(m2 * m2, r * r)
    M = (blocks @ products).view(m1, m1, r, r).permute(2, 0, 3, 1).reshape(r * m1, r * m1)
    mean = M.diagonal().mean()  # factors that are alike make it singular, and those of a zero matrix zero
    M.diagonal().add_(torch.where(mean > 0, ROUNDING * mean, 1.0))
    return torch.cholesky_solve(target, torch.linalg.cholesky(M)).view(r, m1, n1)


def is_low_rank(A_shape, B_shape):
    """Whether a sum of r products is any matrix of rank r: a column times a row, or a row times a column."""
    (_, m1, n1), (_, m2, n2) = A_shape, B_shape
    return (n1 == 1 and m2 == 1) or (m1 == 1 and n2 == 1)


def largest_system(A_shape, B_shape):
    """Order of the largest normal matrix that a fit of A [r, m1, n1] and B [r, m2, n2] factorises."""
    return 0 if is_low_rank(A_shape, B_shape) else A_shape[0] * max(A_shape[1], B_shape[1])


def check_size(A_shape, B_shape):
    """Raise UserError where the normal matrix of a fit is larger than LARGEST_SYSTEM."""
    if (order := largest_system(A_shape, B_shape)) > LARGEST_SYSTEM:
        r, dim_1, dim_2 = A_shape
        raise UserError(f"calibration of {r} factors of ({dim_1}, {dim_2}) needs a normal matrix of order {order:,}, and "
                        f"the largest is {LARGEST_SYSTEM:,}: choose fewer factors or a more even shape")


def reduced_rank(problem, r, A_is_column):
    """The exact least squares of rank r, for any weights of the columns: whitening and one SVD (reduced-rank regression;
    A. J. Izenman, 1975).

    Returns:
        A [r, m, 1] and B [r, 1, n], or A [r, 1, n] and B [r, m, 1].
    """
    L = torch.linalg.cholesky(problem.ridged_G)
    root = problem.weights.sqrt()
    whitened = torch.linalg.solve_triangular(L, problem.ridged_C, upper=False) * root
    if len(whitened) > whitened.shape[1]:
        vectors = torch.linalg.eigh(whitened.T @ whitened).eigenvectors[:, -r:].flip(1)
        left, right = whitened @ vectors, vectors.T
    else:
        vectors = torch.linalg.eigh(whitened @ whitened.T).eigenvectors[:, -r:].flip(1)
        left, right = vectors, vectors.T @ whitened
    column = torch.linalg.solve_triangular(L.T, left, upper=True).T[:, :, None]  # (r, m, 1)
    row = (right / root)[:, None, :]  # (r, 1, n)
    return balanced(column, row) if A_is_column else balanced(row, column)


def swapped(W, m1, n1, m2, n2):
    """W [m1 m2, n1 n2] with its indices in the order [m2 m1, n2 n1]: Σ_f B_f ⊗ A_f for W = Σ_f A_f ⊗ B_f."""
    return W.view(m1, m2, n1, n2).permute(1, 0, 3, 2).reshape(m1 * m2, n1 * n2)


def fit(problem, A, B, steps=ALS_STEPS, fixed_B=False):
    """The Kronecker sum that minimises a Problem, by alternating least squares from A and B; in closed form where it is
    of low rank. The problem's objective never rises from step to step.

    Args:
        problem: a Problem of W [m1 m2, n1 n2].
        A, B: [r, m1, n1] and [r, m2, n2], the start.
        steps: of alternating least squares, at most.
        fixed_B: B stays, and A is the least-squares solution.

    Returns:
        A, B in float64.

    Raises:
        UserError: the normal matrix is too large.
    """
    A, B = float64(A), float64(B)
    (r, m1, n1), (_, m2, n2) = A.shape, B.shape
    if is_low_rank(A.shape, B.shape) and not fixed_B:
        return reduced_rank(problem, r, A_is_column=n1 == 1)
    check_size(A.shape, B.shape)
    u, v = problem.separable_weights(n1, n2)
    G, C = problem.ridged_G, problem.ridged_C
    if fixed_B:
        return als_step(G, C, B, m1, v), B
    swapped_G, swapped_C = swapped(G, m1, m1, m2, m2), swapped(C, m1, n1, m2, n2)
    last = math.inf
    for _ in range(steps):
        A = als_step(G, C, B, m1, v)
        B = als_step(swapped_G, swapped_C, A, m2, u)
        A, B = balanced(A, B)
        now = problem.objective(kron_weight(A, B), (u[:, None] * v).view(-1))
        if now > (1 - TOLERANCE) * last:
            break
        last = now
    return A, B


def initial_factors(problem, dim_1, dim_2, r):
    """A start for alternating least squares: Van Loan's sum for the least-squares solution, with rows and columns scaled
    by the second moments of the inputs and the costs of errors.

    Returns:
        A [r, dim_1, dim_2] and B [r, m/dim_1, n/dim_2]
    """
    m2, n2 = problem.W.shape[0] // dim_1, problem.W.shape[1] // dim_2
    solution = torch.cholesky_solve(problem.ridged_C, torch.linalg.cholesky(problem.ridged_G))
    sizes = problem.ridged_G.diagonal().view(dim_1, m2)
    s, t = sizes.mean(1).sqrt(), (sizes.mean(0) / sizes.mean()).sqrt()
    u, v = (w.sqrt() for w in problem.separable_weights(dim_2, n2))
    A, B = van_loan(solution * (s[:, None] * t).view(-1, 1) * (u[:, None] * v).view(-1), dim_1, dim_2, r)
    return A / s[:, None] / u, B / t[:, None] / v
