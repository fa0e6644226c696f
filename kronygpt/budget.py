"""Budgets: the ranks of all matrices that cost a model least, and the table of shapes that fit a number of parameters."""
from dataclasses import dataclass, field, replace
from decimal import Decimal

import torch

from kronygpt.configurator import UserError
from kronygpt.narrow import tails
from model import KronyGPT, Shape, multiply_adds

SLACK = 0.99  # share of the budget that a shape in the table must use
HALVINGS = 100  # of the interval in which the price of a parameter is searched


@dataclass
class Plan:
    """What becomes of a model: the input of compress.apply().

    how: how it was chosen, in words.
    shapes: {kind: [Shape of each block]}; matrices that it does not name stay as they are.
    losses: {kind: [nats per token that are predicted to be lost in each block]}, or {}.
    fisher: {name of a matrix: F [n, n]} of calibration.statistics(), for the metric of the fit, or None.
    """

    how: str
    shapes: dict
    losses: dict = field(default_factory=dict)
    fisher: dict | None = None

    @property
    def loss(self):  # predicted in all, nats per token
        return sum(map(sum, self.losses.values()))


def parse_budget(text):
    """A number of parameters such as 82M, 1.5B or 82000000, and the largest that is written so: 82M is 82.x million."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9}
    unit = units.get(text[-1:].upper(), 1)
    try:
        number = Decimal(text[:-1] if unit > 1 else text)
        if number <= 0:
            raise ValueError
        last_digit = Decimal(1).scaleb(number.as_tuple().exponent) * unit
        return int(number * unit), int(number * unit + last_digit) - 1
    except (ArithmeticError, ValueError, TypeError):
        raise UserError(f"--budget takes a number of parameters such as 82M, not {text}") from None


def count_parameters(config, without=()):
    """Number of parameters of a KronyGPTConfig's model in which the matrices of the kinds `without` are dense."""
    with torch.device("meta"):
        shapes = {kind: shapes for kind, shapes in config.shapes.items() if kind not in without}
        return KronyGPT(replace(config, shapes=shapes)).count_parameters()["total"]


@dataclass
class MLPShape:
    """One shape of the MLPs: its parameters in all, multiply-adds of an MLP over dense ones, and largest rank."""

    dim_1: int
    dim_2: int
    n_factors: int
    parameters: int
    multiply_adds: float
    rank: int


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
    total = count_parameters(config, config.matrices)
    rest = total - 2 * config.n_layer * C * hidden
    shapes = []
    for dim_1 in (d for d in range(1, C + 1) if C % d == 0):
        for dim_2 in (d for d in range(1, hidden + 1) if hidden % d == 0):
            m1, n1, m2, n2 = dim_1, dim_2, C // dim_1, hidden // dim_2
            per_factor = 2 * config.n_layer * (m1 * n1 + m2 * n2)
            r = max(1, min((largest - rest) // per_factor, m1 * n1, m2 * n2))
            sides = ((r, m1, n1), (r, m2, n2)), ((r, n1, m1), (r, n2, m2))  # of c_fc, and of c_proj, its mirror image
            macs = sum(min(multiply_adds(*pair).values()) for pair in sides)
            shapes.append(MLPShape(dim_1, dim_2, r, rest + r * per_factor, macs / (2 * C * hidden),
                                   min(C, r * min(m1, n1) * min(m2, n2))))
    fitting = [shape for shape in shapes if SLACK * limit <= shape.parameters <= largest]
    if not fitting:
        nearest = min((min(shape.parameters, total) for shape in shapes), key=lambda size: abs(size - limit))
        raise UserError(f"no shape of the MLPs makes a model of {limit:,} parameters: the nearest size is {nearest:,}, and "
                        f"{rest:,} are outside of the MLP matrices. With --calibrate=DATASET all matrices share the budget")

    def interest(shape):
        is_krony_pt, is_low_rank = shape.dim_1 == C and shape.n_factors == 1, (shape.dim_1, shape.dim_2) == (C, 1)
        return not is_krony_pt, not is_low_rank, round(shape.multiply_adds, 2), -shape.rank, shape.dim_1, shape.dim_2

    return sorted(fitting, key=interest)


def room(config, kinds, limit):
    """How many numbers a budget of parameters leaves for the matrices of some kinds in all blocks together.

    Raises:
        UserError: too few for rank 1, or enough for the dense matrices.
    """
    total, sizes = count_parameters(config, kinds), [config.matrices[kind] for kind in kinds]
    dense, least = (config.n_layer * sum(numbers) for numbers in (
        [m * n for m, n in sizes], [min(m + n, m * n) for m, n in sizes]))
    if not least <= limit - (total - dense) < dense:
        raise UserError(f"a budget of {limit:,} parameters is not between {total - dense + least:,}, with rank 1 in all "
                        f"matrices, and {total:,}, which the dense model has")
    return limit - (total - dense)


def plan_ranks(config, kinds, limit, statistics):
    """Ranks for a number of parameters by predicted loss; each matrix is free to stay dense.

    Rank r of a matrix [m, n] has r (m + n) parameters and costs ½ Σ_{i>r} σ_i²; dense has m n and costs nothing.

    Args:
        config: a KronyGPTConfig.
        kinds: names of the matrices of a block to compress, such as "mlp.c_fc"; the shapes of the others stay.
        limit: number of parameters in all, which is never exceeded.
        statistics: calibration.Statistics of the model.

    Returns:
        A Plan.

    Raises:
        UserError: the budget is too small for any rank, or large enough for the dense model.
    """
    spare, kinds = room(config, kinds, limit), [kind for kind in config.matrices if kind in kinds]
    places = [(layer, kind, *config.matrices[kind]) for layer in range(config.n_layer) for kind in kinds]
    parts = []
    for layer, kind, m, n in places:
        costs = tails(statistics.spectra[f"transformer.h.{layer}.{kind}"])
        parts.append([Choice((layer, kind), 0, 0.0, [rank_table(m, n, costs)])])
    plan = Plan(f"ranks for {limit:,} parameters, by predicted loss", {kind: [] for kind in kinds},
                {kind: [] for kind in kinds}, statistics.fisher)
    for (_, kind, m, n), (choice, (row,)) in zip(places, cheapest(parts, spare)):
        (sizes, losses), = choice.tables
        plan.shapes[kind].append(Shape(m, 1, row + 1) if row + 1 < len(sizes) else Shape(m, n, 1))
        plan.losses[kind].append(losses[row].item())
    return plan


@dataclass
class Choice:
    """One way to make a part of a model.

    what: describes it, for whoever reads the result, such as the widths of a block.
    size, loss: parameters and predicted loss in nats per token that it has in any case.
    tables: [(sizes, losses)] of each matrix whose rank is free; sizes rise, losses fall.
    """

    what: object
    size: int
    loss: float
    tables: list


def cheapest(parts, limit):
    """One Choice for each part of a model, and one row of each of its tables, whose sizes sum up to at most the limit and
    whose losses to about the least that can be had so.

    With a price for each parameter every part chooses for itself, and bisection finds the price at which the sum fits.
    What is then left goes, step by step, where it lowers the loss most per parameter.

    Args:
        parts: [[Choice]] of each part.
        limit: at least the sum of the smallest sizes.

    Returns:
        [(Choice, [index of the row of each table])] for each part.
    """
    def choose(price):
        return [min((priced(choice, price) for choice in choices), key=lambda option: option[0])[1:] for choices in parts]

    def used(chosen):
        return sum(choice.size + sum(size[i].item() for (size, _), i in zip(choice.tables, rows)) for choice, rows in chosen)

    largest = max(choice.loss + sum(loss[0].item() for _, loss in choice.tables) for choices in parts for choice in choices)
    low, high = 0.0, 1.0 + len(parts) * largest  # at which nothing is worth a parameter
    for _ in range(HALVINGS):
        price = (low + high) / 2
        low, high = (low, price) if used(choose(price)) <= limit else (price, high)
    chosen = choose(high)
    while True:
        left, best, target = limit - used(chosen), 0.0, None
        for choice, rows in chosen:
            for k, ((size, loss), i) in enumerate(zip(choice.tables, rows)):
                extra, gain = size[i + 1:] - size[i], loss[i] - loss[i + 1:]
                rates = torch.where(extra <= left, gain / extra, 0)
                if len(rates) and rates.max() > best:
                    best, target = rates.max().item(), (rows, k, i + 1 + int(rates.argmax()))
        if target is None:
            return chosen
        rows, k, row = target
        rows[k] = row


def priced(choice, price):
    """(loss and size at a price, the Choice, [its best row of each table])."""
    costs = [loss + price * size for size, loss in choice.tables]
    rows = [int(cost.argmin()) for cost in costs]
    return choice.loss + price * choice.size + sum(cost[i].item() for cost, i in zip(costs, rows)), choice, rows


def rank_table(m, n, costs):
    """(sizes, losses) of a matrix [m, n] at rank 1, 2, ... and dense, from the costs of the ranks from 0."""
    ranks = torch.arange(1, 1 + min((m * n - 1) // (m + n), len(costs) - 1))
    return torch.cat((ranks * (m + n), torch.tensor([m * n]))), torch.cat((costs[ranks].cpu(), costs.new_zeros(1).cpu()))
