"""Budget search: the shapes that fit a number of parameters, and which of them keeps most of a model.

Low rank is a sum of Kronecker products, (C, 1, r), and pruning is one with a B of ones and zeros: a search over dim_1,
dim_2 and the factors covers them all.
"""
import sys
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from calibration import HiddenStatistics, ResidualStream, batches, calibrate, interleave
from compress import factorize
from configurator import UserError
from kron import kron_weight, multiply_adds, van_loan
from least_squares import LARGEST_SYSTEM, Moments, Problem, fit, initial_factors, largest_system
from model import KronyGPT, mlp_shapes

SLACK = 0.99  # share of the budget that a shape must use
PROBED_LAYERS = 3  # blocks on which shapes are ranked
KEPT = 6  # shapes that pass the first ranking, on one block
TRIED = 3  # shapes that pass the second ranking; the whole model is calibrated with each
QUICK_STEPS = 1  # of alternating least squares in the first ranking: none tells little, more change the order little
THOROUGH_STEPS = 3  # in the second
SHARES = (0.5, 0.75, 1.0, 1.5, 2.0)  # of a layer's even number of factors, for uneven ones


@dataclass
class MLPShape:
    """One member of the family: its shape, parameters in all, multiply-adds of an MLP over dense ones, largest rank, and
    the errors that are predicted for it on the middle block and on a few, shares of the residual stream's variance."""

    dim_1: int
    dim_2: int
    n_factors: int
    parameters: int
    multiply_adds: float
    rank: int
    quick_error: float | None = None
    error: float | None = None

    def factor_shapes(self, config):
        """[(A shape, B shape)] of c_fc and of c_proj, its mirror image."""
        m1, n1, m2, n2 = self.dim_1, self.dim_2, config.n_embd // self.dim_1, config.n_inner // self.dim_2
        r = self.n_factors
        return [((r, m1, n1), (r, m2, n2)), ((r, n1, m1), (r, n2, m2))]

    def can_be_fitted(self, config):
        """Whether its normal matrices are not too large."""
        return all(largest_system(*shapes) <= LARGEST_SYSTEM for shapes in self.factor_shapes(config))


def shapes_within(config, limit, largest=None):
    """The MLPShapes with which a model of a KronyGPTConfig, whose own shapes do not matter, fits a number of parameters.

    Args:
        config: a KronyGPTConfig.
        limit: number of parameters, of which a model must use SLACK.
        largest: the most that it may have; default: limit.

    Returns:
        The shapes in the order of people's interest: Krony-PT's, with one factor and all of n_embd in A, low rank, and the
        others by multiply-adds.

    Raises:
        UserError: there is none; names the nearest number of parameters that can be had.
    """
    C, hidden, largest = config.n_embd, config.n_inner, largest or limit
    with torch.device("meta"):
        counts = KronyGPT(replace(config, shapes={})).count_parameters()
    rest = counts["total"] - 2 * config.n_layer * C * hidden
    shapes = []
    for dim_1 in (d for d in range(1, C + 1) if C % d == 0):
        for dim_2 in (d for d in range(1, hidden + 1) if hidden % d == 0):
            m1, n1, m2, n2 = dim_1, dim_2, C // dim_1, hidden // dim_2
            per_factor = 2 * config.n_layer * (m1 * n1 + m2 * n2)
            r = max(1, min((largest - rest) // per_factor, m1 * n1, m2 * n2))
            shape = MLPShape(dim_1, dim_2, r, rest + r * per_factor, 0.0, min(C, r * min(m1, n1) * min(m2, n2)))
            macs = sum(min(multiply_adds(*sides).values()) for sides in shape.factor_shapes(config))
            shapes.append(replace(shape, multiply_adds=macs / (2 * C * hidden)))
    fitting = [shape for shape in shapes if SLACK * limit <= shape.parameters <= largest]
    if not fitting:
        nearest = min((min(shape.parameters, counts["total"]) for shape in shapes), key=lambda total: abs(total - limit))
        raise UserError(f"no shapes fit {limit:,} parameters: the nearest size is {nearest:,}; without its MLP matrices the "
                        f"model has {rest:,}, with them {counts['total']:,}")

    def interest(shape):
        is_krony_pt, is_low_rank = shape.dim_1 == C and shape.n_factors == 1, (shape.dim_1, shape.dim_2) == (C, 1)
        return not is_krony_pt, not is_low_rank, round(shape.multiply_adds, 2), -shape.rank, shape.dim_1, shape.dim_2

    return sorted(fitting, key=interest)


@dataclass
class Probe:
    """What a dense block does to real text: moments of its matrices' inputs and targets, in the order of the model's
    hidden units."""

    fc: Moments
    proj: Moments
    W: torch.Tensor  # [C, n_inner] of c_fc
    W_proj: torch.Tensor  # [n_inner, C]
    contribution: torch.Tensor  # [n_inner], see HiddenStatistics
    sensitivity: torch.Tensor  # [n_inner]
    variance: float  # of the residual stream after the block, summed over its dimensions

    def error(self, dim_1, dim_2, r, steps):
        """The squared error that r factors of (dim_1, dim_2), fitted to this block, put into the residual stream, as a
        share of its variance: that of c_fc by each hidden unit's sensitivity, and that of c_proj."""
        n1, n2 = dim_2, len(self.W[0]) // dim_2
        order = interleave(self.contribution, n1, n2)
        total = 0.0
        for moments, W, weights, dims in (
                (self.fc.reordered(targets=order), self.W[:, order], self.sensitivity[order], (dim_1, dim_2)),
                (self.proj.reordered(inputs=order), self.W_proj[order], None, (dim_2, dim_1))):
            problem = Problem(moments, W, weights)
            A, B = fit(problem, *initial_factors(problem, *dims, r), steps=steps)
            errors = problem.squared_errors(kron_weight(A, B))
            total += (errors if weights is None else errors * weights).sum().item()
        return total / self.variance


@torch.no_grad()
def probe(model, text, layers):
    """Yields the Probes of some layers of a model on (windows, T) tokens, of some 200 C² bytes each."""
    stream = ResidualStream(model, text)
    for layer, block in enumerate(model.transformer.h):
        stream.attend(layer)
        if layer not in layers:
            stream.transform(layer)
            continue
        fc, proj, statistics = Moments(), Moments(), HiddenStatistics(block.mlp)
        for _, x, z, h, y in stream.mlp(layer):
            fc.add(x, z)
            proj.add(h, y)
            statistics.add(z, h)
        variance = stream.x.flatten(0, 1).var(0).sum().item()
        yield Probe(fc, proj, block.mlp.c_fc.weight, block.mlp.c_proj.weight, statistics.contribution(),
                    statistics.sensitivity(), variance)


@torch.no_grad()
def loss_on(model, x, y):
    """Mean cross entropy in nats of tokens y (windows, T) after x (windows, T)."""
    model.eval()
    return (sum(model(x[rows], y[rows]).item() * len(x[rows]) for rows in batches(x)) / len(x))


def uneven_factors(probes, shape, config):
    """Factors for each layer with the sum of the shape's, spent where the predicted error falls most: from the fewest of
    SHARES, the layer with the largest gain per factor gets its next share.

    Args:
        probes: yields one for each layer.
        shape: an MLPShape.
        config: the KronyGPTConfig of the model.
    """
    n_layer, sides = config.n_layer, shape.dim_1 * shape.dim_2
    most = min(sides, config.n_embd * config.n_inner // sides)  # which reach every matrix
    steps = sorted({min(most, max(1, round(share * shape.n_factors))) for share in SHARES})
    steps = [r for r in steps if replace(shape, n_factors=r).can_be_fitted(config)]
    curves = [[probe.error(shape.dim_1, shape.dim_2, r, QUICK_STEPS) for r in steps] for probe in probes]
    factors, chosen, left = [steps[0]] * n_layer, [0] * n_layer, n_layer * (shape.n_factors - steps[0])
    while left:
        gains = {layer: (curve[i] - curve[i + 1]) / (steps[i + 1] - steps[i])
                 for layer, (curve, i) in enumerate(zip(curves, chosen)) if i + 1 < len(steps)}
        layer = max(gains, key=gains.get)
        extra = min(left, steps[chosen[layer] + 1] - steps[chosen[layer]])
        factors[layer] += extra
        chosen[layer] += 1
        left -= extra
    return factors


@dataclass
class Candidate:
    """A shape with which the whole model was calibrated, and its loss on other text in nats per token."""

    dim_1: int
    dim_2: int
    factors: list[int]
    loss: float


def search(model, text, held_out, limit):
    """The member of the family that keeps most of a model within a budget.

    Ranks all shapes by the predicted error on the middle block, the best of them on a few blocks with more care,
    calibrates the best of these on the whole model without refinement, and compares their losses on other text; then
    it tries uneven factors for the winner. (Swift-SVD, arXiv 2604.01609, chooses the ranks of low rank by predicted
    loss.) Shapes that calibration cannot fit, for the size of their normal matrix, are omitted.

    Args:
        model: a KronyGPT, dense or not, on the device of the text.
        text: (windows, T) tokens to calibrate on.
        held_out: (x, y), (windows, T) each, other text, on which losses are compared.
        limit: number of parameters in all.

    Returns:
        [MLPShape] and [Candidate], the best ones first.

    Raises:
        UserError: no shape fits the budget.
    """
    n_layer = model.config.n_layer
    mirrored = 1, model.config.n_inner  # the same sums as (C, 1): low rank
    shapes = [s for s in shapes_within(model.config, limit)
              if (s.dim_1, s.dim_2) != mirrored and s.can_be_fitted(model.config)]
    if not shapes:
        raise UserError(f"no shapes that fit {limit:,} parameters can be calibrated: their normal matrices are too large")
    layers = sorted({round(i * (n_layer - 1) / max(1, PROBED_LAYERS - 1)) for i in range(PROBED_LAYERS)})
    few = list(probe(model, text, layers))

    def mean_error(shape, probes, steps):
        return sum(p.error(shape.dim_1, shape.dim_2, shape.n_factors, steps) for p in probes) / len(probes)

    def candidate(dim_1, dim_2, factors):
        new = factorize(model, mlp_shapes(dim_1, dim_2, factors), van_loan)
        calibrate(model, new, text)
        return Candidate(dim_1, dim_2, factors, loss_on(new, *held_out))

    bar = dict(unit="shape", leave=False, disable=not sys.stderr.isatty())
    for shape in tqdm(shapes, "ranking", **bar):
        shape.quick_error = mean_error(shape, [few[len(few) // 2]], QUICK_STEPS)
    shapes.sort(key=lambda shape: shape.quick_error)
    for shape in tqdm(shapes[:KEPT], "ranking the best", **bar):
        shape.error = mean_error(shape, few, THOROUGH_STEPS)
    shapes[:KEPT] = sorted(shapes[:KEPT], key=lambda shape: shape.error)
    tried = [candidate(s.dim_1, s.dim_2, [s.n_factors] * n_layer) for s in shapes[:TRIED]]
    shape = shapes[min(range(len(tried)), key=lambda i: tried[i].loss)]
    if shape.n_factors > 1:
        factors = uneven_factors(probe(model, text, range(n_layer)), shape, model.config)
        if len(set(factors)) > 1:
            tried.append(candidate(shape.dim_1, shape.dim_2, factors))
    return shapes, sorted(tried, key=lambda c: c.loss)
