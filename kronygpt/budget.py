"""Budgets: the ranks of all matrices that cost a model least, and the table of shapes that fit a number of parameters."""
import math
from dataclasses import dataclass, field, replace
from decimal import Decimal

import torch

from kronygpt.calibration import progress
from kronygpt.configurator import UserError
from kronygpt.narrow import Block, narrowed, tails
from model import KINDS, KronyGPT, Shape, multiply_adds

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
    widths: dict = field(default_factory=dict)
    narrowed: KronyGPT | None = None

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
    C, hidden, largest = config.n_embd, config.n_inner[0], largest or limit
    total = count_parameters(config, KINDS)
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
    total = count_parameters(config, kinds)
    sizes = [config.sizes(layer)[kind] for layer in range(config.n_layer) for kind in kinds]
    dense, least = sum(m * n for m, n in sizes), sum(m + n - 1 for m, n in sizes)
    if not least <= limit - (total - dense) < dense:
        raise UserError(f"a budget of {limit:,} parameters is not between {total - dense + least:,}, with rank 1 in all "
                        f"matrices, and {total:,}, which the dense model has")
    return limit - (total - dense)


def rank_choices(m, n, squares):
    """Sizes and predicted losses of ranks 1, 2, ... of a matrix [m, n], and of the dense one at the end.

    Each rank is stored once: rank r has r (m + n - r) numbers. It costs ½ Σ_{i>r} σ_i² for the σ² of calibration.spectrum.
    """
    ranks = torch.arange(1, min(m, n))
    return (torch.cat((ranks * (m + n - ranks), torch.tensor([m * n]))), tails(squares.cpu())[1:])


def shape_of(choice, m, n):
    """The Shape of an index into rank_choices(m, n, ...)."""
    return Shape(m, 1, choice + 1) if choice + 1 < min(m, n) else Shape(m, n, 1)


def plan_ranks(config, kinds, limit, statistics):
    """Ranks for a number of parameters by predicted loss; each matrix is free to stay dense.

    With a price for each parameter every matrix chooses for itself among rank_choices(), and bisection finds the price at
    which the model fits. What is then left goes, step by step, where it lowers the loss most per parameter.

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
    spare, kinds = room(config, kinds, limit), [kind for kind in KINDS if kind in kinds]
    places = [(layer, kind, *config.sizes(layer)[kind]) for layer in range(config.n_layer) for kind in kinds]
    sizes, losses = zip(*(rank_choices(m, n, statistics.spectra[f"transformer.h.{layer}.{kind}"])
                          for layer, kind, m, n in places))
    plan = Plan(f"ranks for {limit:,} parameters, by predicted loss", {kind: [] for kind in kinds},
                {kind: [] for kind in kinds}, statistics.fisher)
    for (_, kind, m, n), loss, choice in zip(places, losses, cheapest(sizes, losses, spare)):
        plan.shapes[kind].append(shape_of(choice, m, n))
        plan.losses[kind].append(loss[choice].item())
    return plan


def plan_model(dense, limit, statistics, head_step=None, hidden_step=None):
    """Widths and ranks of all blocks for a number of parameters, by predicted loss.

    With a price for each parameter the attention of each block chooses widths of its heads and the ranks of its two matrices,
    and its MLP a number of hidden units and two ranks. Bisection finds the price at which the model fits. What is then left
    goes to ranks.

    Args:
        dense: a KronyGPT.
        limit: number of parameters in all, which is never exceeded.
        statistics: calibration.Statistics of all its matrices.
        head_step, hidden_step: widths are multiples of these, or stay as they are where it is 0; default: an eighth of a head,
            and a 32nd of the hidden units.

    Returns:
        A Plan.
    """
    config = dense.config
    head_step = max(1, config.head_dim // 8) if head_step is None else head_step
    hidden_step = max(1, config.n_inner[0] // 32) if hidden_step is None else hidden_step
    blocks = [Block(dense, layer, statistics) for layer in range(config.n_layer)]
    parts = [options for block in progress(blocks, "widths", "block")
             for options in (block.attention(head_step), block.mlp(hidden_step))]
    tables = [[(option, [rank_choices(*matrix) for matrix in option.matrices.values()]) for option in part] for part in parts]
    vectors_and_matrices = sum(m * n + n for layer in range(config.n_layer) for m, n in config.sizes(layer).values())
    spare = limit - (count_parameters(config, KINDS) - vectors_and_matrices)

    def choose(price):
        chosen, used = [], 0
        for part in tables:
            best = math.inf, None, 0
            for k, (option, matrices) in enumerate(part):
                loss, size = option.loss, option.n_biases
                for sizes, losses in matrices:
                    i = int((losses + price * sizes).argmin())
                    loss, size = loss + losses[i].item(), size + sizes[i].item()
                best = min(best, (loss + price * size, k, size))
            chosen.append(best[1])
            used += best[2]
        return chosen, used

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        price = (low * high)**0.5 if low else high / 2
        low, high = (low, price) if choose(price)[1] <= spare else (price, high)
        if low and high / low < 1.001:
            break
    options = [part[k][0] for part, k in zip(tables, choose(high)[0])]
    places = [(layer, kind, m, n, squares) for i, option in enumerate(options) for layer in (i // 2,)
              for kind, (m, n, squares) in option.matrices.items()]
    sizes, losses = zip(*(rank_choices(m, n, squares) for _, _, m, n, squares in places))
    ranks = cheapest(sizes, losses, spare - sum(option.n_biases for option in options))
    plan = Plan(f"widths and ranks for {limit:,} parameters, by predicted loss", {kind: [] for kind in KINDS},
                {kind: [] for kind in KINDS} | dict(heads=[], hidden=[]), {}, {})
    for (_, kind, m, n, _), loss, choice in zip(places, losses, ranks):
        plan.shapes[kind].append(shape_of(choice, m, n))
        plan.losses[kind].append(loss[choice].item())
    for i, option in enumerate(options):
        plan.losses["hidden" if i % 2 else "heads"].append(option.loss)
        for name, width in option.widths.items():
            plan.widths.setdefault(name, []).append(width)
    plan.narrowed, plan.fisher = narrowed(dense, blocks, plan.widths)
    return plan


def cheapest(sizes, losses, limit):
    """One choice for each matrix whose sizes sum up to at most the limit and whose losses to about the least that can be
    had so.

    Args:
        sizes, losses: for each matrix those of its choices: sizes rise, losses fall.
        limit: at least the sum of the smallest sizes.

    Returns:
        [index of a choice] for each matrix.
    """
    def choose(price):
        return [int((loss + price * size).argmin()) for size, loss in zip(sizes, losses)]

    def used(chosen):
        return sum(size[i].item() for size, i in zip(sizes, chosen))

    low, high = 0.0, 1.0 + sum(loss[0].item() for loss in losses)  # at which nothing is worth a parameter
    for _ in range(HALVINGS):
        price = (low + high) / 2
        low, high = (low, price) if used(choose(price)) <= limit else (price, high)
    chosen = choose(high)
    while True:
        left, best = limit - used(chosen), (0.0, None)
        for k, (size, loss, i) in enumerate(zip(sizes, losses, chosen)):
            extra, gain = size[i + 1:] - size[i], loss[i] - loss[i + 1:]
            rates = torch.where(extra <= left, gain / extra, 0)
            if len(rates) and rates.max() > best[0]:
                best = rates.max().item(), (k, i + 1 + int(rates.argmax()))
        if best[1] is None:
            return chosen
        chosen[best[1][0]] = best[1][1]
