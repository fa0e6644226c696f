"""Calibration: what the matrices of a model do to real text, and a compressed model that does the same.

Van Loan's decomposition keeps the weights; what matters is what the weights do to activations. calibrate() goes through the
blocks in order and fits one MLP matrix after the other by least squares. The inputs come from the model compressed so far
and the targets from the dense model, so each matrix compensates for the errors of the earlier ones.
"""
import sys
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from tqdm import tqdm

from configurator import UserError
from data import even_starts, load_tokens, windows
from device import float64, pick_device
from least_squares import ROUNDING, Moments, Problem, check_size, fit, initial_factors, share

TOKENS_AT_ONCE = 8192  # in a batch of the forward passes
REFINE_RATE = 1e-3  # learning rate of the refinement, at its beginning
REFINE_TOKENS = 1024  # in a gradient step of the refinement


class ResidualStream:
    """The hidden states (windows, T, C) of a model on tokens, moved through its blocks one at a time."""

    def __init__(self, model, tokens):
        self.model = model
        position = torch.arange(tokens.shape[1], device=tokens.device)
        self.x = model.transformer.wte(tokens) + model.transformer.wpe(position)

    def attend(self, layer):
        """Move through a block's attention."""
        block = self.model.transformer.h[layer]
        for rows in batches(self.x):
            self.x[rows] += block.attn(block.ln_1(self.x[rows]))

    def mlp_input(self, layer, rows):
        """The input of a block's MLP, (tokens, C)."""
        return self.model.transformer.h[layer].ln_2(self.x[rows]).flatten(0, 1)

    def mlp(self, layer):
        """Move through a block's MLP, a batch at a time.

        Yields:
            rows: slice of the windows of a batch; they get the MLP's output after the yield;
            x (tokens, C), z (tokens, n_inner), h (tokens, n_inner), y (tokens, C): the MLP's input, its pre-activations,
                activations and output.
        """
        mlp = self.model.transformer.h[layer].mlp
        for rows in batches(self.x):
            x = self.mlp_input(layer, rows)
            z = mlp.c_fc(x)
            h = F.gelu(z, approximate="tanh")
            y = mlp.c_proj(h)
            yield rows, x, z, h, y
            self.x[rows] += y.view_as(self.x[rows])

    def transform(self, layer):
        """Move through a block's MLP in one call."""
        for _ in self.mlp(layer):
            pass


def batches(x):
    """Slices of x (windows, T, C) with about TOKENS_AT_ONCE tokens each."""
    step = max(1, TOKENS_AT_ONCE // x.shape[1])
    return [slice(begin, begin + step) for begin in range(0, len(x), step)]


def gelu_slope(z):
    """gelu'(z)."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(F.gelu(z, approximate="tanh").sum(), z)[0]


class HiddenStatistics:
    """How much the hidden units of an MLP matter on real text."""

    def __init__(self, mlp):
        self.norms = float64(mlp.c_proj.weight).square().sum(1)  # of the rows of c_proj
        self.sums, self.count = self.norms.new_zeros(3, len(self.norms)), 0

    def add(self, z, h):
        """Add a batch of pre-activations z and activations h (tokens, n_inner)."""
        self.sums += float64(torch.stack((h.sum(0), h.square().sum(0), gelu_slope(z).square().sum(0))))
        self.count += len(z)

    def contribution(self):
        """[n_inner], the variance that each unit adds to the residual stream: that of its activation times the squared
        norm of its row in c_proj."""
        mean, square, _ = self.sums / self.count
        return self.norms * (square - mean.square())

    def sensitivity(self):
        """[n_inner], the cost of a squared error in each unit's pre-activation: E[gelu'²] times the squared norm."""
        return self.norms * self.sums[2] / self.count


def interleave(contribution, n1, n2):
    """An order of hidden units in which the units that contribute most share no column of A.

    Unit j of c_fc takes column j // n2 of A and column j % n2 of B. The n1 strongest units take the first column of B, the
    next n1 the second, and so on: each of the strongest has a column of A of its own, and a B of a one and zeros would prune
    the others.

    Returns:
        [n1 n2], the old index of each unit in its new place.
    """
    return contribution.argsort(descending=True).view(n2, n1).T.reshape(-1)


@torch.no_grad()
def contributions(model, tokens):
    """How much hidden units and dimensions of the residual stream contribute on real text.

    Returns:
        hidden [n_layer, n_inner], as in HiddenStatistics; and embd [C], the variance that each dimension gives to the
        pre-activations of all MLPs: that of the MLP's input times the squared norm of its row in c_fc.
    """
    stream, hidden, embd = ResidualStream(model, tokens), [], 0
    for layer, block in enumerate(model.transformer.h):
        stream.attend(layer)
        statistics, sums = HiddenStatistics(block.mlp), 0
        for _, x, z, h, _ in stream.mlp(layer):
            statistics.add(z, h)
            sums = sums + float64(torch.stack((x.sum(0), x.square().sum(0))))
        mean, square = sums / statistics.count
        hidden.append(statistics.contribution())
        embd = embd + (square - mean.square()) * float64(block.mlp.c_fc.weight.square().sum(1))
    return torch.stack(hidden), embd


@torch.no_grad()
def norms(model):
    """The same as contributions(), by the weights alone: squared norms of the rows of c_fc (embd), and the product of
    those of each hidden unit's column in c_fc and row in c_proj."""
    squares = [(block.mlp.c_fc.weight.square(), block.mlp.c_proj.weight.square()) for block in model.transformer.h]
    return torch.stack([fc.sum(0) * proj.sum(1) for fc, proj in squares]), sum(fc.sum(1) for fc, _ in squares)


@dataclass
class Fit:
    """What calibration did to one matrix: relative errors of the weights, ‖W − Ŵ‖ / ‖W‖, and of their output on real text,
    ‖Y − X̂ Ŵ − b‖ over the norm of the centred Y; before and after. The absolute ones, where the norm is 0."""

    layer: int
    name: str
    n_factors: int
    weight_error_before: float
    weight_error: float
    output_error_before: float
    output_error: float


def fit_matrix(matrix, problem, W, old, fixed_B):
    """Fit a matrix to a Problem.

    Args:
        matrix: a KronLinear, whose factors and bias are set.
        problem: its Problem.
        W: [m, n], the dense weights.
        old: (weight [m, n], bias [n]) of the matrix before.
        fixed_B: its B stays.

    Returns:
        The relative errors of the weights, before and after, and those of the output.
    """
    r, dim_1, dim_2 = matrix.A.shape
    start = (matrix.A, matrix.B) if fixed_B else initial_factors(problem, dim_1, dim_2, r)
    A, B = fit(problem, *start, fixed_B=fixed_B)
    matrix.A.data, matrix.B.data = (side.to(W.dtype).to(W.device) for side in (A, B))
    matrix.bias.data = problem.bias(matrix.weight).to(W.dtype).to(W.device)
    pairs = old, (matrix.weight, matrix.bias)
    return (*(share((W - V).norm(), W.norm()) for V, _ in pairs), *(problem.error(V, b) ** 0.5 for V, b in pairs))


@torch.no_grad()
def calibrate(dense, compressed, tokens, fixed_B=False, reorder=True, refine_steps=0):
    """Fit the MLPs of a compressed model so that its blocks do to real text what those of the dense model do.

    It goes through the blocks in order. c_fc is fitted to the dense model's pre-activations, with each hidden unit's
    column weighted by the cost of an error; c_proj to the difference that brings the residual stream back to the dense
    model's. A new order of the hidden units changes nothing in the dense model. All biases are fitted, too.

    For N tokens, width C and L layers it takes about L N (67 C² + 8 C T + 1.5 M) floating point operations with a context
    of T, where M is the cost of a token in an MLP of the new shape, from 4 C² at (C, C, 1) to 16 C²: 35 C² are moments and
    16 C² each the attention of both models and the dense MLP. Refinement takes another L S (3 M) for S tokens in all its
    steps, and least squares with many factors can take minutes a matrix. Memory: 8 N C bytes of hidden states and
    about 650 C² for moments and their factorisations.

    Args:
        dense: a KronyGPT.
        compressed: a KronyGPT made from it by factorize(), on the same device; its MLPs are changed in place.
        tokens: (windows, T), on that device.
        fixed_B: keep each B and fit A alone.
        reorder: put the hidden units into the order of interleave() first.
        refine_steps: gradient steps on each block after the closed form.

    Returns:
        [Fit], two a block.

    Raises:
        UserError: a shape whose normal matrix is too large.
    """
    for block in compressed.transformer.h:
        for matrix in (block.mlp.c_fc, block.mlp.c_proj):
            check_size(matrix.A.shape, matrix.B.shape)
    teacher, student = ResidualStream(dense, tokens), ResidualStream(compressed, tokens)
    fits = []
    for layer in tqdm(range(dense.config.n_layer), "calibrating", unit="block", leave=False,
                      disable=not sys.stderr.isatty()):
        teacher.attend(layer)
        student.attend(layer)
        mlp, target = compressed.transformer.h[layer].mlp, dense.transformer.h[layer].mlp
        moments, statistics = Moments(), HiddenStatistics(target)
        for rows, _, z, h, _ in teacher.mlp(layer):
            moments.add(student.mlp_input(layer, rows), z)
            statistics.add(z, h)
        order = slice(None)
        if reorder:
            order = interleave(statistics.contribution(), mlp.c_fc.A.shape[2], mlp.c_fc.B.shape[2]).to(tokens.device)
        W = target.c_fc.weight[:, order]
        problem = Problem(moments.reordered(targets=order), W, statistics.sensitivity()[order])
        old = mlp.c_fc.weight[:, order], mlp.c_fc.bias[order]
        fits.append(Fit(layer, "mlp.c_fc", len(mlp.c_fc.A), *fit_matrix(mlp.c_fc, problem, W, old, fixed_B)))

        moments = Moments()
        for rows in batches(teacher.x):
            h = F.gelu(mlp.c_fc(student.mlp_input(layer, rows)), approximate="tanh")
            moments.add(h, (teacher.x[rows] - student.x[rows]).flatten(0, 1))
        W = target.c_proj.weight[order]
        old = mlp.c_proj.weight[order], mlp.c_proj.bias
        fits.append(Fit(layer, "mlp.c_proj", len(mlp.c_proj.A),
                        *fit_matrix(mlp.c_proj, Problem(moments, W), W, old, fixed_B)))
        if refine_steps:
            refine(teacher, student, layer, refine_steps)
        student.transform(layer)
    return fits


def refine(teacher, student, layer, steps):
    """Gradient steps on the MLP of one block, towards the dense model's hidden states behind it (AA-SVD, arXiv 2604.02119,
    does this for low rank).

    Args:
        teacher: the dense model's ResidualStream, behind the block.
        student: the compressed model's, in front of the block's MLP.
    """
    mlp = student.model.transformer.h[layer].mlp
    trained = [p.requires_grad_() for p in mlp.parameters()]
    optimizer = torch.optim.Adam(trained, lr=REFINE_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(layer)
    n_rows = max(1, REFINE_TOKENS // teacher.x.shape[1])
    for _ in range(steps):
        rows = torch.randint(len(teacher.x), (n_rows,), generator=generator).to(teacher.x.device)
        x, y = student.mlp_input(layer, rows), (teacher.x[rows] - student.x[rows]).flatten(0, 1)
        with torch.enable_grad():
            loss = (mlp(x) - y).square().mean() / y.var().clamp(min=ROUNDING)
            gradients = torch.autograd.grad(loss, trained)
        for p, gradient in zip(trained, gradients):
            p.grad = gradient
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def calibration_text(dataset, n_tokens, config, device, between=False, tokenizer=None):
    """Windows spread evenly over the training split of a data set.

    Args:
        dataset: its name under data/.
        n_tokens: number of tokens.
        config: the KronyGPTConfig of the model that reads them.
        device: its name, or "" for the default.
        tokenizer: the model's record of its tokenizer, or None where its vocabulary tells it.
        between: the windows halfway between those, one fewer: text that calibration has not seen.

    Returns:
        (windows, block_size) tokens, and the ones that follow them.

    Raises:
        UserError: fewer tokens than a window has, or than a matrix has inputs.
    """
    context, hidden = config.block_size, config.n_inner
    if n_tokens < max(context, hidden):
        raise UserError(f"{n_tokens} calibration tokens are too few: a window has {context}, and a matrix up to {hidden} "
                        "inputs, which fewer tokens cannot tell apart")
    tokens = load_tokens(dataset, "train", config.vocab_size, context, tokenizer)
    n = n_tokens // context
    starts = even_starts(len(tokens), context, max(3, 2 * n - 1))[1::2] if between else even_starts(len(tokens), context, n)
    return windows(tokens, starts, context, config.vocab_size, pick_device(device))
