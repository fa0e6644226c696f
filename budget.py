"""Budget search: which shapes come to a number of parameters, and which of them keeps most of a model.

Low rank is a sum of Kronecker products, (C, 1, r), and pruning is one with a B of ones and zeros: a search over dim_1,
dim_2 and the factors covers them all.
"""
import sys
from dataclasses import dataclass, replace

import torch

from calibration import HiddenStatistics, Moments, Problem, Stream, batches, calibrate, fit, interleave, start
from model import KronyGPT, kron_weight, multiply_adds

SLACK = 0.99  # shapes that use less than this share of the budget are left out
PROBED_LAYERS = 3  # blocks on which shapes are ranked
KEPT = 6  # shapes that the first ranking, on one block, leaves to the second
TRIED = 3  # shapes that the second ranking leaves to the calibration of the whole model
QUICK_STEPS = 1  # of alternating least squares in the first ranking: none tells little, more change the order little
THOROUGH_STEPS = 3  # in the second
SHARES = (0.5, 0.75, 1.0, 1.5, 2.0)  # of a layer's even number of factors, for uneven ones


class NoShapeError(ValueError):
    """No shape comes to the budget; the message is one line for the user."""

    exit_status = 2


@dataclass
class Shape:
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


def shapes_within(config, limit):
    """The Shapes with which a model of a KronyGPTConfig, whose own shape does not matter, has at most `limit` parameters,
    and at least SLACK of them.

    Raises:
        NoShapeError: there is none.
    """
    C, hidden = config.n_embd, config.n_hidden
    with torch.device("meta"):
        counts = KronyGPT(replace(config, dim_1=None, dim_2=None, factors=1)).count_parameters()
    rest = counts["total"] - counts["factors"]
    shapes = []
    for dim_1 in (d for d in range(1, C + 1) if C % d == 0):
        for dim_2 in (d for d in range(1, hidden + 1) if hidden % d == 0):
            sides = m1, n1, m2, n2 = dim_1, dim_2, C // dim_1, hidden // dim_2
            per_factor = 2 * config.n_layer * (m1 * n1 + m2 * n2)
            r = min((limit - rest) // per_factor, m1 * n1, m2 * n2)
            total = rest + r * per_factor
            if r < 1 or total < SLACK * limit:
                continue
            macs = sum(min(multiply_adds(s, r).values()) for s in (sides, (n1, m1, n2, m2)))
            shapes.append(Shape(dim_1, dim_2, r, total, macs / (2 * C * hidden), min(C, r * min(m1, n1) * min(m2, n2))))
    if not shapes:
        raise NoShapeError(f"no shapes come to {limit:,} parameters: without its MLP matrices the model has {rest:,}, "
                           f"with them {counts['total']:,}")
    return sorted(shapes, key=lambda shape: (shape.parameters, shape.dim_1, shape.dim_2, shape.n_factors))


@dataclass
class Probe:
    """What a dense block does to real text: moments of its matrices' inputs and targets, in the order of the model's
    hidden units."""

    fc: Moments
    proj: Moments
    W: torch.Tensor  # [C, 4C] of c_fc
    W_proj: torch.Tensor  # [4C, C]
    contribution: torch.Tensor  # [4C], see HiddenStatistics
    sensitivity: torch.Tensor  # [4C]
    variance: float  # of the residual stream after the block, summed over its dimensions

    def error(self, van_loan, dim_1, dim_2, r, steps):
        """The squared error that r factors of (dim_1, dim_2), fitted to this block, put into the residual stream, as a
        share of its variance: that of c_fc by each hidden unit's sensitivity, and that of c_proj."""
        n1, n2 = dim_2, len(self.W[0]) // dim_2
        order = interleave(self.contribution, n1, n2)
        total = 0.0
        for moments, W, weights, dims in (
                (self.fc.reordered(targets=order), self.W[:, order], self.sensitivity[order], (dim_1, dim_2)),
                (self.proj.reordered(inputs=order), self.W_proj[order], None, (dim_2, dim_1))):
            problem = Problem(moments, W, weights)
            A, B = fit(problem, *start(problem, van_loan, *dims, r), steps=steps)
            errors = problem.squared_errors(kron_weight(A, B))
            total += (errors if weights is None else errors * weights).sum().item()
        return total / self.variance


@torch.no_grad()
def probe(model, text, layers):
    """Yields the Probes of some layers of a model on (windows, T) tokens, of some 200 C² bytes each."""
    stream = Stream(model, text)
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
        W, W_proj = (kron_weight(*pair) for pair in block.mlp.factor_pairs())
        variance = stream.x.flatten(0, 1).var(0).sum().item()
        yield Probe(fc, proj, W, W_proj, statistics.contribution(), statistics.sensitivity(), variance)


@torch.no_grad()
def loss_on(model, x, y):
    """Mean cross entropy in nats of tokens y (windows, T) after x (windows, T)."""
    model.eval()
    return (sum(model(x[rows], y[rows]).item() * len(x[rows]) for rows in batches(x)) / len(x))


def uneven_factors(probes, van_loan, shape, config):
    """Factors for each layer that come to those of the shape in all, spent where the predicted error falls most: from
    the fewest that are tried on, the layer with the largest gain per factor gets its next share.

    Args:
        probes: yields one for each layer.
        config: the KronyGPTConfig of the model.
    """
    n_layer, sides = config.n_layer, shape.dim_1 * shape.dim_2
    most = min(sides, config.n_embd * config.n_hidden // sides)  # which reach every matrix
    steps = sorted({min(most, max(1, round(share * shape.n_factors))) for share in SHARES})
    curves = [[probe.error(van_loan, shape.dim_1, shape.dim_2, r, QUICK_STEPS) for r in steps] for probe in probes]
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
    """A shape that was calibrated on the whole model, and its loss on other text in nats per token."""

    dim_1: int
    dim_2: int
    factors: list[int]
    loss: float


def search(model, text, held_out, limit, van_loan):
    """The member of the family that keeps most of a model within a budget.

    Ranks all shapes by the predicted error on the middle block, the best of them on a few blocks with more care,
    calibrates the best of these on the whole model without refinement, and compares their losses on other text; then
    it tries uneven factors for the winner. (Swift-SVD, arXiv 2604.01609, chooses the ranks of low rank by predicted
    loss.)

    Args:
        model: a KronyGPT, dense or not, on the device of the text.
        text: (windows, T) tokens to calibrate on.
        held_out: (x, y), (windows, T) each, other text, whose loss decides.
        limit: number of parameters in all.
        van_loan: as in calibrate().

    Returns:
        [Shape] and [Candidate], the best ones first.

    Raises:
        NoShapeError: no shape comes to the budget.
    """
    from tqdm import tqdm

    n_layer = model.config.n_layer
    mirrored = 1, model.config.n_hidden  # the same sums as (C, 1): low rank
    shapes = [s for s in shapes_within(model.config, limit) if (s.dim_1, s.dim_2) != mirrored]
    layers = sorted({round(i * (n_layer - 1) / max(1, PROBED_LAYERS - 1)) for i in range(PROBED_LAYERS)})
    few = list(probe(model, text, layers))

    def mean_error(shape, probes, steps):
        return sum(p.error(van_loan, shape.dim_1, shape.dim_2, shape.n_factors, steps) for p in probes) / len(probes)

    def candidate(dim_1, dim_2, factors):
        new, _ = calibrate(model, text, dim_1, dim_2, factors, van_loan)
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
        factors = uneven_factors(probe(model, text, range(n_layer)), van_loan, shape, model.config)
        if len(set(factors)) > 1:
            tried.append(candidate(shape.dim_1, shape.dim_2, factors))
    return shapes, sorted(tried, key=lambda c: c.loss)
