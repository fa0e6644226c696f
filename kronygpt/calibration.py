"""Calibration: what the matrices of a model do to real text, and a compressed model that does the same.

Van Loan's decomposition keeps the weights; what matters is what the weights do to activations, and what an error there does
to the loss. statistics() measures the latter; calibrate() goes through the blocks in order and fits one matrix after the
other by least squares. The inputs come from the model compressed so far and the targets from the dense model, so each
matrix compensates for the errors of the earlier ones.
"""
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from kronygpt.configurator import progress
from kronygpt.device import float64
from kronygpt.least_squares import Moments, Problem, fit, gram, share, targets_of
from kronygpt.narrow import spectrum
from model import ChunkedLinearLoss, PaddedKronLinear

TOKENS_AT_ONCE = 8192  # in a batch of the forward passes
GRADIENT_TOKENS = 1024  # in a batch of a backward pass
STATISTICS_TOKENS = 32768  # at most, of statistics(); with a quarter or four times as many the loss is within 0.001
HALVES = {"attn": ("ln_1", "c_attn"), "mlp": ("ln_2", "c_fc")}  # the norm and the first matrix; the second is c_proj


class ResidualStream:
    """Hidden states (windows, T, C) of a model, without dropout, on tokens, moved through its half blocks one at a time."""

    def __init__(self, model, tokens):
        self.model = model.eval()
        position = torch.arange(tokens.shape[1], device=tokens.device)
        self.x = model.transformer.wte(tokens) + model.transformer.wpe(position)

    def input(self, layer, half, rows):
        """The input of a half block's first matrix, (windows, T, C)."""
        return self.model.transformer.h[layer].get_submodule(HALVES[half][0])(self.x[rows])

    def through(self, layer, half, move=True):
        """Run a half block, "attn" or "mlp", a batch at a time.

        Args:
            move: whether its output is added to the stream.

        Yields:
            rows: slice of the windows of a batch; they get the output after the yield;
            x (tokens, C), h (tokens, width of all values, or n_inner): inputs of the first matrix and of c_proj.
        """
        module = self.model.transformer.h[layer].get_submodule(half)
        for rows in batches(self.x):
            x = self.input(layer, half, rows)
            h = module.between(module.get_submodule(HALVES[half][1])(x))
            yield rows, x.flatten(0, -2), without_zeros(module.c_proj, h, 0).flatten(0, -2)
            if move:
                self.x[rows] += module.c_proj(h)

    def move(self, layer, half):
        """Move through a half block in one call."""
        for _ in self.through(layer, half):
            pass


def without_zeros(module, t, dim):
    """An input (dim 0) or an output (dim 1) of a module without columns that are only zeros."""
    return module.without_zeros(t, dim) if isinstance(module, PaddedKronLinear) else t


def batches(x, n_tokens=TOKENS_AT_ONCE):
    """Slices of x (windows, T, ...) with about n_tokens tokens each."""
    step = max(1, n_tokens // x.shape[1])
    return [slice(begin, begin + step) for begin in range(0, len(x), step)]


@dataclass
class Statistics:
    """What the widths and ranks of a model cost follows from these, all in float64.

    An error e [n] in the output of a matrix at one token adds about ½ eᵀ F e to the loss, where F = E[g gᵀ] and g is the
    gradient of the summed loss at that output, with labels that are drawn from the model itself (the Fisher information
    of the output).

    For each matrix [m, n], by its name in the model: fisher F [n, n], and means [m] and covariances [m, m] of the inputs.
    For the embeddings: embedding_fisher [C, C], of the gradient at their sum; hidden [C, C], second moments of the final
    hidden states; frequencies and probabilities [vocab_size] of the tokens, in the text and in the predictions;
    uncertainty, the mean of 1 - p of a token that is drawn from the predictions.
    """

    fisher: dict
    means: dict
    covariances: dict
    embedding_fisher: torch.Tensor
    hidden: torch.Tensor
    frequencies: torch.Tensor
    probabilities: torch.Tensor
    uncertainty: float

    def spectrum(self, name, matrix):
        """spectrum() of a KronLinear of this name: rank r adds at least ½ Σ_{i>r} σ_i² nats per token."""
        return spectrum(float64(matrix.weight.detach()), self.covariances[name], self.fisher[name])


def statistics(model, tokens):
    """The Statistics of a KronyGPT on a text (windows, T), from one pass over an even sample of STATISTICS_TOKENS.

    Memory for L blocks of width C with 4 C hidden units: 8 bytes for each of L 46 C² numbers (GPT-2 small: 2.6 GB, XL: 45
    GB), and what a backward pass of GRADIENT_TOKENS tokens, or one window, takes.
    """
    wte = model.transformer.wte
    frequencies = float64(torch.bincount(tokens.flatten(), minlength=model.config.vocab_size)) / tokens.numel()
    tokens = tokens[::math.ceil(tokens.numel() / STATISTICS_TOKENS)]
    names = [f"transformer.h.{layer}.{kind}" for layer, kind, _ in model.matrices()]
    moments, grams, p_sum, p_squares = {name: Moments() for name in names}, {}, 0, 0
    generator = torch.Generator(tokens.device).manual_seed(0)

    def add_gram(name, x):
        grams[name] = grams.get(name, 0) + float64(gram(x.detach().flatten(0, -2)))

    def watch(name):
        def hook(module, inputs, output):
            if name in moments:
                moments[name].add(without_zeros(module, inputs[0].detach(), 0).flatten(0, -2))
            output.register_hook(lambda g: add_gram(name, without_zeros(module, g, 1)))

        return model.get_submodule(name).register_forward_hook(hook)

    def loss_of_samples(logits, targets):
        nonlocal p_sum, p_squares
        p = F.softmax(logits.detach(), -1)
        p_sum, p_squares = p_sum + float64(p.sum(0)), p_squares + p.square().sum().item()
        return F.cross_entropy(logits, torch.multinomial(p, 1, generator=generator)[:, 0], reduction="sum")

    model.eval()
    hooks = [watch(name) for name in (*names, "transformer.drop")]
    for rows in progress(batches(tokens, GRADIENT_TOKENS), desc="gradients", unit="batches"):
        x = model.hidden(tokens[rows]).flatten(0, 1)
        add_gram("hidden", x)
        z, parts, targets = wte.as_output(x, tokens[rows].flatten())
        loss = ChunkedLinearLoss.apply(loss_of_samples, x.dtype, len(parts), z, *(W.detach() for W in parts), targets)
        torch.autograd.grad(loss, next(model.transformer.wpe.parameters()))  # which goes back through all blocks
    for hook in hooks:
        hook.remove()
    n, means, covariances = tokens.numel(), {}, {}
    for name in names:  # one at a time: both copies of all would take gigabytes
        means[name], _, covariances[name], *_ = moments.pop(name).centred()
    fisher = {name: grams.pop(name).div_(n) for name in names}
    return Statistics(fisher, means, covariances, grams["transformer.drop"] / n, grams["hidden"] / n, frequencies,
                      p_sum / n, 1 - p_squares / n)


def interleave(contribution, n_groups):
    """An order of units in which the n_groups strongest are in different groups.

    Unit j of c_fc takes column j // n2 of A and column j % n2 of B. The n_groups strongest units take the first column of B,
    the next n_groups the second, and so on. So each of the strongest has a column of A to itself, and a B of a one and
    zeros would prune the others.

    Args:
        contribution: [n_groups n2].

    Returns:
        [n_groups n2], the old index of each unit in its new place.
    """
    return contribution.argsort(descending=True).view(-1, n_groups).T.reshape(-1)


@torch.no_grad()
def contributions(model, tokens):
    """How much each hidden unit contributes on real text, [n_layer, n_inner]: the variance that it adds to the residual
    stream, which is that of its activation times the squared norm of its row in c_proj."""
    stream, result = ResidualStream(model, tokens), []
    for layer, block in enumerate(model.transformer.h):
        stream.move(layer, "attn")
        sums = sum(float64(torch.stack((h.sum(0), h.square().sum(0)))) for *_, h in stream.through(layer, "mlp"))
        mean, square = sums / tokens.numel()
        result.append((square - mean.square()) * float64(block.mlp.c_proj.weight.square().sum(1)))
    return torch.stack(result)


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


def fit_matrix(goal, compressed, layer, kind, centred, fisher, fixed_B):
    """Fit a matrix of a compressed model, and its bias, to Centred moments. Args as in calibrate(). Returns the Fit."""
    name = f"transformer.h.{layer}.{kind}"
    matrix, W = compressed.get_submodule(name), goal.get_submodule(name).weight
    problem, before = Problem(centred, W, fisher.get(name)), (matrix.weight, matrix.bias)
    A, B = fit(problem, matrix.A, matrix.B, fixed_B)
    matrix.A.data, matrix.B.data = (side.to(W.dtype).to(W.device) for side in (A, B))
    matrix.bias.data = problem.bias(matrix.weight).to(W.dtype).to(W.device)
    pairs = before, (matrix.weight, matrix.bias)
    return Fit(layer, kind, len(A), *(share((W - V).norm(), W.norm()) for V, _ in pairs),
               *(problem.error(V, b) ** 0.5 for V, b in pairs))


def fit_half(teacher, student, goal, layer, half, fisher, fixed_B):
    """Fit the matrices of a half block, "attn" or "mlp", and move the ResidualStreams of both models through it. Args as in
    calibrate(). Returns [Fit]."""
    fits, first, last = [], f"{half}.{HALVES[half][1]}", f"{half}.c_proj"

    def matrix(model, kind):
        return model.transformer.h[layer].get_submodule(kind)

    def is_fitted(kind):  # dense and of the old size it stays
        new = matrix(student.model, kind)
        return not new.is_dense or new.A.shape != matrix(teacher.model, kind).A.shape

    moments = Moments()
    for rows, x, _ in teacher.through(layer, half):
        if is_fitted(first):
            moments.add(torch.cat((student.input(layer, half, rows).flatten(0, 1), x), 1))
    if is_fitted(first):
        wanted = matrix(goal, first)
        centred = targets_of(moments, wanted.weight, wanted.bias)
        fits.append(fit_matrix(goal, student.model, layer, first, centred, fisher, fixed_B))
    if is_fitted(last):
        moments = Moments()
        for rows, _, h in student.through(layer, half, move=False):
            moments.add(h, (teacher.x[rows] - student.x[rows]).flatten(0, 1))
        fits.append(fit_matrix(goal, student.model, layer, last, moments.centred(), fisher, fixed_B))
    student.move(layer, half)
    return fits


@torch.no_grad()
def calibrate(dense, compressed, tokens, fisher=None, fixed_B=False, goal=None):
    """Fit the matrices of a compressed model so that its blocks do to real text what those of the dense model do.

    It goes through the blocks in order. c_attn and c_fc are fitted to the dense model's outputs, in the columns that the
    compressed model has; both c_proj to the difference that brings the residual stream back to the dense model's. All their
    biases are fitted, too. Matrices that are dense and of the old size stay as they are.

    For N tokens, width C and L layers it takes about L N (105 C² + 12 C T) floating point operations with a context of T:
    40 C² are moments, the others the dense model, once, and the compressed one, twice, c_proj apart. Least squares with many
    factors can take minutes a matrix. Memory: 8 N C bytes of hidden states, and about 800 C² for moments and their
    factorizations.

    Args:
        dense: a KronyGPT.
        compressed: a KronyGPT made from the goal by factorize(), on the same device; changed in place.
        tokens: (windows, T), on that device.
        fisher: {name of a matrix: F [n, n]} of statistics(), for the metric of errors. Default: all errors count alike.
        fixed_B: keep each B and fit A alone.
        goal: the dense model in the compressed model's widths; default: the dense model itself.

    Returns:
        [Fit], one for each matrix that was fitted, in the order of the model.
    """
    fisher = fisher or {}
    teacher, student, fits = ResidualStream(dense, tokens), ResidualStream(compressed, tokens), []
    for layer in progress(range(dense.config.n_layer), desc="calibrating", unit="blocks"):
        for half in HALVES:
            fits += fit_half(teacher, student, goal or dense, layer, half, fisher, fixed_B)
    return fits
