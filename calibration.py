"""Calibration: statistics of activations on real text, and least squares for Kronecker sums on them.

Van Loan's decomposition keeps the weights; what should be kept is what each layer does to real text. For inputs X̂, which
come from the model compressed so far, and targets Y of the dense model, fit() minimises

    ‖Y − X̂ Σ_f A_f ⊗ B_f − 1 bᵀ‖²

from the moments X̂ᵀX̂ and X̂ᵀY alone, so that its memory does not depend on the number of tokens. calibrate() does it for
one matrix after the other, and gives the next one the errors of those before to make up for.
"""
import copy
import math
import sys
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import checkpoint
from data import DataError, even_starts, load_tokens, windows
from model import kron_linear, kron_weight, pick_device

RIDGE = 1e-3  # pull towards the trained weights, as a share of the mean second moment of an input
STEPS = 30  # of alternating least squares, at most
TOLERANCE = 1e-4  # relative gain of a step, below which they end
LARGEST_SYSTEM = 4096  # unknowns in a column up to which a normal matrix is factorised; conjugate gradients beyond
CG_STEPS = 10  # iterations of conjugate gradients in a half step
TOKENS_AT_ONCE = 8192  # in a batch of the forward passes
ROUNDING = 1e-12  # what counts as nothing beside 1 in float64
REFINE_RATE = 1e-3  # learning rate of the refinement, at its beginning
REFINE_TOKENS = 1024  # in a gradient step of the refinement
GRAM_COLUMNS = 512  # of a strip of XᵀX


def gram(X):
    """XᵀX [m, m] for X (T, m), strip by strip from the diagonal on: what is left of it is a mirror image."""
    G = X.new_empty(X.shape[1], X.shape[1])
    for begin in range(0, len(G), GRAM_COLUMNS):
        strip = slice(begin, begin + GRAM_COLUMNS)
        G[strip, begin:] = X[:, strip].T @ X[:, begin:]
        G[begin + GRAM_COLUMNS:, strip] = G[strip, begin + GRAM_COLUMNS:].T
    return G


class Moments:
    """Means and centred second moments of inputs X [m] and targets Y [n] over any number of tokens, in float64.

    Products of a batch are in float32, relative to the first batch's means, and summed up in float64.
    """

    def __init__(self):
        self.count = 0

    def add(self, X, Y):
        """Take in X (T, m) and Y (T, n)."""
        if not self.count:
            self.origin = X.mean(0), Y.mean(0)
            m, n = X.shape[1], Y.shape[1]
            self.sums = [X.new_zeros(shape, dtype=torch.float64) for shape in (m, n, (m, m), (m, n), n)]
        X, Y = X - self.origin[0], Y - self.origin[1]
        for total, part in zip(self.sums, (X.sum(0), Y.sum(0), gram(X), X.T @ Y, Y.square().sum(0))):
            total += part
        self.count += len(X)

    def reordered(self, inputs=slice(None), targets=slice(None)):
        """The moments of X[:, inputs] and Y[:, targets]."""
        new = copy.copy(self)
        (x, y), (sum_x, sum_y, G, C, yy) = self.origin, self.sums
        new.origin = x[inputs], y[targets]
        new.sums = [sum_x[inputs], sum_y[targets], G[inputs][:, inputs], C[inputs][:, targets], yy[targets]]
        return new

    def centred(self):
        """(mean_x [m], mean_y [n], G [m, m], C [m, n], variance of Y [n]), where G and C are averages over the tokens
        of the products of what is left of X and Y without their means."""
        x, y, G, C, yy = (total / self.count for total in self.sums)
        return (x + self.origin[0], y + self.origin[1], G - x[:, None] * x, C - x[:, None] * y,
                (yy - y.square()).clamp(min=0))


class Problem:
    """The least squares of one matrix: find A [r, m1, n1] and B [r, m2, n2].

    Args:
        moments: Moments of X̂ and Y.
        W: [m, n], the trained weights, towards which a ridge pulls.
        weights: [n], what an error in each column costs, of which none counts as nothing; alike if left out.
        ridge: share of the mean second moment of an input.
    """

    def __init__(self, moments, W, weights=None, ridge=RIDGE):
        self.mean_x, self.mean_y, self.G, self.C, self.variance = moments.centred()
        weights = torch.ones_like(self.variance) if weights is None else weights.double()
        self.weights = (weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)).clamp(min=ROUNDING)
        self.W = W.double()
        self.penalty = ridge * self.G.diagonal().mean()
        self.ridged_G = self.G + self.penalty * torch.eye(len(self.G), dtype=torch.float64, device=W.device)
        self.ridged_C = self.C + self.penalty * self.W

    def squared_errors(self, W):
        """Mean of (Y − X̂ W − b)² over the tokens, for each column [n], with the best b."""
        return self.variance - 2 * (W * self.C).sum(0) + (W * (self.G @ W)).sum(0)

    def error(self, W, bias=None):
        """Weighted mean of (Y − X̂ W − b)² over tokens and columns, relative to the variance of Y; with the best bias if
        none is given."""
        W = W.double()
        residual = self.squared_errors(W)
        if bias is not None:
            residual = residual + (self.mean_y - self.mean_x @ W - bias.double()).square()
        residual = residual.clamp(min=0)  # which the rounding of the moments can miss
        return ((self.weights * residual).sum() / (self.weights * self.variance).sum()).item()

    def objective(self, W, weights):
        """What a fit minimises: the sum of the squared errors and the ridge, by columns, times their weights [n]."""
        W = W.double()
        ridge = self.penalty * (W - self.W).square().sum(0)
        return (weights * (self.squared_errors(W) + ridge)).sum().item()

    def bias(self, W):
        """The best bias [n] for weights W."""
        return self.mean_y - self.mean_x @ W.double()

    def separable_weights(self, n1, n2):
        """u [n1] and v [n2], the nearest to the columns' weights that a half step can use: u ⊗ v."""
        grid = self.weights.view(n1, n2)
        return grid.mean(1), grid.mean(0)


def half_step(G, C, A, B, weights):
    """The best A for a fixed B: an ordinary least-squares problem whose normal matrix, over (factor, row of A), is the
    same for all columns of A.

    Args:
        G: [m1*m2, m1*m2], second moments of the inputs.
        C: [m1*m2, n1*n2], cross moments.
        A: [r, m1, n1], the last one: where the system is too large to factorise, conjugate gradients set out from it.
        B: [r, m2, n2].
        weights: [n2], of B's columns; those of A's columns do not matter.

    Returns:
        A [r, m1, n1]
    """
    (r, m1, n1), (_, m2, n2) = A.shape, B.shape
    weighted = (B * weights).permute(1, 2, 0).reshape(m2 * n2, r)

    def project(Z):  # the inner products of Z [m, n] with what each number of A adds to the sum
        blocks = Z.view(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
        return (blocks @ weighted).view(m1, n1, r).permute(2, 0, 1).reshape(r * m1, n1)

    if r * m1 > LARGEST_SYSTEM:
        def normal_product(X):
            return project(G @ kron_weight(X.view(r, m1, n1), B))

        return conjugate_gradients(normal_product, project(C), A.reshape(r * m1, n1)).view(r, m1, n1)
    if r * m2 * (n2 + m1 * m1) < m1 * m1 * n2 * (m2 + r):  # by multiply-adds
        blocks = G.view(m1, m2, m1, m2).permute(0, 2, 1, 3).reshape(m1 * m1, m2 * m2)
        products = torch.einsum("fij,j,gkj->ikfg", B, weights, B).reshape(m2 * m2, r * r)
        M = (blocks @ products).view(m1, m1, r, r).permute(2, 0, 3, 1).reshape(r * m1, r * m1)
    else:  # one column of B after the other: products [m2*m2, r*r] of many factors are too large to store
        M = G.new_zeros(m1, r, m1 * r)
        for column, weight in zip(B.unbind(2), weights):  # (r, m2)
            M += (weight * column) @ (G.view(-1, m2) @ column.T).view(m1, m2, m1 * r)
        M = M.view(m1, r, m1, r).permute(1, 0, 3, 2).reshape(r * m1, r * m1)
    M.diagonal().add_(ROUNDING * M.diagonal().mean())  # factors that are alike leave it without an inverse
    return torch.cholesky_solve(project(C), torch.linalg.cholesky(M)).view(r, m1, n1)


def conjugate_gradients(multiply, target, x):
    """Some steps from x towards the solution of multiply(x) = target, for a positive definite multiply."""
    residual = target - multiply(x)
    direction, square = residual, residual.square().sum()
    for _ in range(CG_STEPS):
        image = multiply(direction)
        length = square / (direction * image).sum().clamp(min=torch.finfo(x.dtype).tiny)
        x, residual = x + length * direction, residual - length * image
        square, last_square = residual.square().sum(), square
        direction = residual + square / last_square.clamp(min=torch.finfo(x.dtype).tiny) * direction
    return x


def balanced(A, B):
    """The same products with ‖A_f‖ = ‖B_f‖, but where one side is a single element, it is 1."""
    a, b = (side.flatten(1).norm(dim=1).clamp(min=torch.finfo(side.dtype).tiny)[:, None, None] for side in (A, B))
    if A[0].numel() == 1:
        return torch.ones_like(A), B * A
    if B[0].numel() == 1:
        return A * B, torch.ones_like(B)
    scale = (b / a).sqrt()
    return A * scale, B / scale


def is_low_rank(A_shape, B_shape):
    """Whether a sum of r products is any matrix of rank r: a column times a row, or a row times a column."""
    (m1, n1), (m2, n2) = A_shape, B_shape
    return (n1 == 1 and m2 == 1) or (m1 == 1 and n2 == 1)


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


def swapped(W, shape_A, shape_B):
    """W [m1*m2, n1*n2] in the order of indices that has B's side in front: sum_f B_f ⊗ A_f for W = sum_f A_f ⊗ B_f."""
    (m1, n1), (m2, n2) = shape_A, shape_B
    return W.view(m1, m2, n1, n2).permute(1, 0, 3, 2).reshape(m1 * m2, n1 * n2)


def fit(problem, A, B, steps=STEPS, fixed_B=False):
    """The Kronecker sum that minimises a Problem, by alternating least squares from A and B; in closed form where it is
    of low rank. The problem's objective never rises from step to step.

    Args:
        problem: a Problem of W [m1*m2, n1*n2].
        A, B: [r, m1, n1] and [r, m2, n2], the start.
        steps: of alternating least squares, at most.
        fixed_B: B stays, and A is the least-squares solution.

    Returns:
        A, B in float64.
    """
    A, B = A.double(), B.double()
    shapes = A.shape[1:], B.shape[1:]
    if is_low_rank(*shapes) and not fixed_B:
        return reduced_rank(problem, len(A), A_is_column=A.shape[2] == 1)
    u, v = problem.separable_weights(A.shape[2], B.shape[2])
    G, C = problem.ridged_G, problem.ridged_C
    if fixed_B:
        return half_step(G, C, A, B, v), B
    inputs = (shapes[0][0], shapes[0][0]), (shapes[1][0], shapes[1][0])
    swapped_G, swapped_C = swapped(G, *inputs), swapped(C, *shapes)
    last = math.inf
    for _ in range(steps):
        A = half_step(G, C, A, B, v)
        B = half_step(swapped_G, swapped_C, B, A, u)
        A, B = balanced(A, B)
        now = problem.objective(kron_weight(A, B), (u[:, None] * v).view(-1))
        if now > (1 - TOLERANCE) * last:
            break
        last = now
    return A, B


def start(problem, van_loan, dim_1, dim_2, r):
    """Where alternating least squares set out from: Van Loan's sum for the least-squares solution, with rows and columns
    scaled by the size of what they meet."""
    m2, n2 = problem.W.shape[0] // dim_1, problem.W.shape[1] // dim_2
    solution = torch.cholesky_solve(problem.ridged_C, torch.linalg.cholesky(problem.ridged_G))
    sizes = problem.ridged_G.diagonal().view(dim_1, m2)
    s, t = sizes.mean(1).sqrt(), (sizes.mean(0) / sizes.mean()).sqrt()
    u, v = (w.sqrt() for w in problem.separable_weights(dim_2, n2))
    A, B = van_loan(solution * (s[:, None] * t).view(-1, 1) * (u[:, None] * v).view(-1), dim_1, dim_2, r)
    return A / s[:, None] / u, B / t[:, None] / v


class Stream:
    """Hidden states in front of a block, (windows, T, C), and what one block after the other makes of them."""

    def __init__(self, model, tokens):
        self.model = model
        position = torch.arange(tokens.shape[1], device=tokens.device)
        self.x = model.transformer.wte(tokens) + model.transformer.wpe(position)

    def attend(self, layer):
        """Go through a block's attention."""
        block = self.model.transformer.h[layer]
        for rows in batches(self.x):
            self.x[rows] += block.attn(block.ln_1(self.x[rows]))

    def mlp_input(self, layer, rows):
        """What the MLP of a block sees, (tokens, C)."""
        return self.model.transformer.h[layer].ln_2(self.x[rows]).flatten(0, 1)

    def mlp(self, layer):
        """Go through a block's MLP, a batch after the other.

        Yields:
            rows: slice of the windows of a batch, which get the MLP's output after the yield;
            x (tokens, C), z (tokens, 4C), h (tokens, 4C), y (tokens, C): the MLP's input, its pre-activations,
                activations and output.
        """
        mlp = self.model.transformer.h[layer].mlp
        fc, proj = mlp.factor_pairs()
        for rows in batches(self.x):
            x = self.mlp_input(layer, rows)
            z = kron_linear(x, *fc, mlp.c_fc_bias)
            h = F.gelu(z, approximate="tanh")
            y = kron_linear(h, *proj, mlp.c_proj_bias)
            yield rows, x, z, h, y
            self.x[rows] += y.view_as(self.x[rows])

    def transform(self, layer):
        """Go through a block's MLP, all at once."""
        for _ in self.mlp(layer):
            pass


def batches(x):
    """Slices of x (windows, T, C) with about TOKENS_AT_ONCE tokens each."""
    step = max(1, TOKENS_AT_ONCE // x.shape[1])
    return [slice(begin, begin + step) for begin in range(0, len(x), step)]


def gelu_slope(z):
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(F.gelu(z, approximate="tanh").sum(), z)[0]


class HiddenStatistics:
    """How much the hidden units of an MLP matter on real text."""

    def __init__(self, mlp):
        self.norms = kron_weight(*mlp.factor_pairs()[1]).double().square().sum(1)  # of the rows of c_proj
        self.sums, self.count = self.norms.new_zeros(3, len(self.norms)), 0

    def add(self, z, h):
        """Take in pre-activations z and activations h (tokens, 4C)."""
        self.sums += torch.stack((h.sum(0), h.square().sum(0), gelu_slope(z).square().sum(0)))
        self.count += len(z)

    def contribution(self):
        """[4C], the variance of what each unit adds to the residual stream, which is that of its activation times the
        squared norm of its row in c_proj."""
        mean, square, _ = self.sums / self.count
        return self.norms * (square - mean.square())

    def sensitivity(self):
        """[4C], what a squared error in each unit's pre-activation costs there, E[gelu'²] times the squared norm."""
        return self.norms * self.sums[2] / self.count


def interleave(contribution, n1, n2):
    """An order of hidden units in which those that contribute most share no column of A.

    Unit j of c_fc takes column j // n2 of A and column j % n2 of B. The n1 strongest units come to the first column of B,
    the next n1 to the second, and so on: so each of them has a column of A for itself, and a B of a one and zeros would
    prune the others.

    Returns:
        [n1*n2], the old index of each unit in its new place.
    """
    return contribution.argsort(descending=True).view(n2, n1).T.reshape(-1)


@torch.no_grad()
def contributions(model, tokens):
    """How much hidden units and dimensions of the residual stream contribute on real text.

    Returns:
        hidden [n_layer, 4C], as in HiddenStatistics; and embd [C], the variance that each dimension gives to the
        pre-activations of all MLPs: that of the MLP's input times the squared norm of its row in c_fc.
    """
    stream, hidden, embd = Stream(model, tokens), [], 0
    for layer, block in enumerate(model.transformer.h):
        stream.attend(layer)
        statistics, sums = HiddenStatistics(block.mlp), 0
        for _, x, z, h, _ in stream.mlp(layer):
            statistics.add(z, h)
            sums = sums + torch.stack((x.sum(0), x.square().sum(0))).double()
        mean, square = sums / statistics.count
        hidden.append(statistics.contribution())
        embd = embd + (square - mean.square()) * kron_weight(*block.mlp.factor_pairs()[0]).square().sum(1)
    return torch.stack(hidden), embd


@torch.no_grad()
def norms(model):
    """What contributions() returns, by the weights alone: squared norms of the rows of c_fc (embd), and the product of
    those of each hidden unit's column in c_fc and row in c_proj."""
    pairs = [[kron_weight(*pair).square() for pair in block.mlp.factor_pairs()] for block in model.transformer.h]
    return torch.stack([fc.sum(0) * proj.sum(1) for fc, proj in pairs]), sum(fc.sum(1) for fc, _ in pairs)


@torch.no_grad()
def reordered(model, hidden=None, embd=None):
    """The same function as a dense KronyGPT with its units in another order.

    Args:
        hidden: [n_layer, 4C], the old index of each hidden unit in its new place, or None.
        embd: [C], that of each dimension of the residual stream, or None.
    """
    config = model.config
    dense = model.refactored(config.n_embd, config.n_hidden, [1] * config.n_layer,
                             lambda W, *_: (W[None], W.new_ones(1, 1, 1)))
    state_dict = dense.state_dict()
    last, first = [], []  # names of what has the residual stream as its last dimension, and as the one that is written
    for layer in range(config.n_layer):
        h = f"transformer.h.{layer}."
        if hidden is not None:
            for name, axis in (("c_fc_0", 2), ("c_fc_bias", 0), ("c_proj_0", 1)):
                state_dict[h + "mlp." + name] = state_dict[h + "mlp." + name].index_select(axis, hidden[layer])
        last += [h + name for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.c_attn.weight",
                                       "attn.c_proj.bias", "mlp.c_proj_0", "mlp.c_proj_bias")]
        first += [(h + "attn.c_proj.weight", 0), (h + "mlp.c_fc_0", 1)]
    if embd is not None:
        last += [f"transformer.{name}" for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")]
        for name, axis in (*((name, -1) for name in last), *first):
            state_dict[name] = state_dict[name].index_select(axis, embd)
        state_dict["lm_head.weight"] = state_dict["transformer.wte.weight"]
    return dense.from_state_dict(dense.model_args(), state_dict)


@dataclass
class Fit:
    """What calibration did to one matrix: relative errors of the weights, ‖W − Ŵ‖ / ‖W‖, and of what they make of real
    text, ‖Y − X̂ Ŵ − b‖ over ‖Y‖ without its mean; by the uncalibrated sum, and by the fitted one."""

    layer: int
    name: str
    n_factors: int
    weight_error_before: float
    weight_error: float
    output_error_before: float
    output_error: float


def fit_matrix(mlp, name, moments, W, bias, weights, approximate, fixed_B):
    """Fit c_fc or c_proj of an MLP to the moments of its inputs and targets.

    Args:
        mlp: a KronyMLP, whose factors and bias of this name are set.
        moments: Moments of X̂ and Y.
        W, bias: [m, n] and [n], the dense model's.
        weights: [n], what an error in each column costs, or None.
        approximate, fixed_B: as in calibrate().

    Returns:
        The relative errors of the weights, uncalibrated and calibrated, and those of the output.
    """
    factors = [getattr(mlp, name + part) for part in ("_0", "_1")]
    r, dim_1, dim_2 = factors[0].shape
    problem = Problem(moments, W, weights)
    plain = approximate(W, dim_1, dim_2, r)
    A, B = fit(problem, *(plain if fixed_B else start(problem, approximate, dim_1, dim_2, r)), fixed_B=fixed_B)
    new_bias = problem.bias(kron_weight(A, B))
    for p, value in zip((*factors, getattr(mlp, name + "_bias")), (A, B, new_bias)):
        p.copy_(value)
    matrices = kron_weight(*plain), kron_weight(*factors)
    return (*(((W - V).norm() / W.norm()).item() for V in matrices),
            *(problem.error(V, b) ** 0.5 for V, b in zip(matrices, (bias, new_bias))))


@torch.no_grad()
def calibrate(model, tokens, dim_1, dim_2, factors, approximate, fixed_B=False, reorder=True, refine_steps=0):
    """The KronyGPT of another shape whose blocks do to real text what those of a model do.

    It goes through the blocks in order. c_fc is fitted to the dense model's pre-activations, with each hidden unit's
    column weighted by what an error costs; c_proj to what brings the residual stream back to that of the dense model.
    A new order of the hidden units changes nothing in the dense model. All biases are fitted, too.

    For N tokens, width C and L layers it takes about L N (67 C² + 8 C T + 1.5 M) floating point operations with a context
    of T, where M is what a token costs in an MLP of the new shape, from 4 C² at (C, C, 1) to 16 C²: 35 C² are moments and
    16 C² each the attention of both models and the dense MLP. Refinement takes another L S (3 M) for S tokens in all its
    steps, and least squares with many factors can take minutes a matrix. Memory: 8 N C bytes of hidden states and
    about 650 C² for moments and what is made of them.

    Args:
        model: a KronyGPT, dense or not.
        tokens: (windows, T), on the model's device.
        dim_1, dim_2, factors: the new shape, as in KronyGPTConfig.
        approximate: function (W [m, n], dim_1, dim_2, n_factors) -> A, B of one matrix, to start from: van_loan.
        fixed_B: keep the B that approximate gives, and fit A alone.
        reorder: put the hidden units into the order of interleave() first.
        refine_steps: gradient steps on each block after the closed form.

    Returns:
        (new model, [Fit])

    Raises:
        ModelError: the shape does not fit the model.
    """
    from tqdm import tqdm

    new = copy.deepcopy(model.refactored(dim_1, dim_2, factors, approximate))  # which shares tensors with the model
    _, n1, _, n2 = new.config.sides
    dense, compressed = Stream(model, tokens), Stream(new, tokens)
    fits = []
    for layer in tqdm(range(model.config.n_layer), "calibrating", unit="block", leave=False,
                      disable=not sys.stderr.isatty()):
        dense.attend(layer)
        compressed.attend(layer)
        mlp, target = new.transformer.h[layer].mlp, model.transformer.h[layer].mlp
        W, W_proj = (kron_weight(*pair) for pair in target.factor_pairs())
        moments, statistics = Moments(), HiddenStatistics(target)
        for rows, _, z, h, _ in dense.mlp(layer):
            moments.add(compressed.mlp_input(layer, rows), z)
            statistics.add(z, h)
        order = interleave(statistics.contribution(), n1, n2) if reorder else slice(None)
        W, b, W_proj = W[:, order], target.c_fc_bias[order], W_proj[order]

        errors = fit_matrix(mlp, "c_fc", moments.reordered(targets=order), W, b, statistics.sensitivity()[order],
                            approximate, fixed_B)
        fits.append(Fit(layer, "c_fc", len(mlp.c_fc_0), *errors))
        moments = Moments()
        for rows in batches(dense.x):
            z = kron_linear(compressed.mlp_input(layer, rows), mlp.c_fc_0, mlp.c_fc_1, mlp.c_fc_bias)
            moments.add(F.gelu(z, approximate="tanh"), (dense.x[rows] - compressed.x[rows]).flatten(0, 1))
        errors = fit_matrix(mlp, "c_proj", moments, W_proj, target.c_proj_bias, None, approximate, fixed_B)
        fits.append(Fit(layer, "c_proj", len(mlp.c_proj_0), *errors))
        if refine_steps:
            refine(dense, compressed, layer, refine_steps)
        compressed.transform(layer)
    return new, fits


def refine(dense, compressed, layer, steps):
    """Gradient steps on the MLP of one block, towards the dense model's hidden states after it (AA-SVD, arXiv
    2604.02119, does this for low rank): `dense` is past the block, `compressed` in front of its MLP."""
    mlp = compressed.model.transformer.h[layer].mlp
    trained = [p.requires_grad_() for p in mlp.parameters()]
    optimizer = torch.optim.Adam(trained, lr=REFINE_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(layer)
    n_rows = max(1, REFINE_TOKENS // dense.x.shape[1])
    for _ in range(steps):
        rows = torch.randint(len(dense.x), (n_rows,), generator=generator).to(dense.x.device)
        x, y = compressed.mlp_input(layer, rows), (dense.x[rows] - compressed.x[rows]).flatten(0, 1)
        with torch.enable_grad():
            loss = (mlp(x) - y).square().mean() / y.var()
            gradients = torch.autograd.grad(loss, trained)
        for p, gradient in zip(trained, gradients):
            p.grad = gradient
        optimizer.step()
        schedule.step()


def calibration_text(dataset, n_tokens, config, device, between=False):
    """Windows spread evenly over the training split of a data set.

    Args:
        dataset: its name under data/.
        n_tokens: how many tokens.
        config: the KronyGPTConfig that they are for.
        device: the name of one, or nothing.
        between: those halfway between these windows, for choices that calibration should not have seen the text of; one
            less of them.

    Returns:
        (windows, block_size) tokens, and the ones that follow them.

    Raises:
        DataError: fewer tokens than a window has, or than the inputs of a matrix are.
    """
    context, hidden = config.block_size, config.n_hidden
    if n_tokens < max(context, hidden):
        raise DataError(f"{n_tokens} calibration tokens are too few: a window has {context}, and a matrix up to {hidden} "
                        "inputs, each of which needs tokens to be told from the others")
    tokens = load_tokens(dataset, "train", config.vocab_size, context)
    n = n_tokens // context
    starts = even_starts(len(tokens), context, max(3, 2 * n - 1))[1::2] if between else even_starts(len(tokens), context, n)
    return windows(tokens, starts, context, config.vocab_size, pick_device(device))


def save_calibrated(model, text, path, config, *shape, **options):
    """Calibrate a model, show what that does to each matrix, and write the checkpoint.

    Args:
        model: a KronyGPT.
        text: (windows, T) tokens, on the device to use.
        path: of the .pt file.
        config: the options to keep in it.
        shape, options: what calibrate() takes after the tokens.
    """
    checkpoint.check_is_file(path)
    start = time.perf_counter()
    new, fits = calibrate(model.to(text.device), text, *shape, **options)
    seconds = time.perf_counter() - start
    print("relative errors of the weights ‖W - Ŵ‖/‖W‖ and of what comes out on real text, uncalibrated → fitted"
          f"{', after which each block was refined' if options.get('refine_steps') else ''}\n"
          f"{'layer':>5}  {'matrix':<6}  {'factors':>7}  {'weights':>17}  {'output':>17}")
    for f in fits:
        print(f"{f.layer:>5}  {f.name:<6}  {f.n_factors:>7}  {f.weight_error_before:>7.4f} → {f.weight_error:>7.4f}  "
              f"{f.output_error_before:>7.4f} → {f.output_error:>7.4f}")
    checkpoint.save_compressed(model.cpu(), new.cpu(), path, config,
                               f"calibrating on {text.numel():,} tokens took {seconds:.0f} s")
