"""Budgets: the widths and ranks that cost a model least, and the shapes of the MLPs that make a number of parameters."""
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from itertools import product

import torch

from kronygpt.configurator import UserError, progress
from kronygpt.device import glibc
from kronygpt.narrow import HEAD_STEPS, HIDDEN_STEPS, N_BANDS, Block, Choice, Staircase, Table, grid, narrowed, rank_table
from model import KINDS, KronyGPT, Shape, multiply_adds

NEAR = 0.01  # relative difference from the number of parameters that is asked for, at which a shape of the MLPs is listed
NARROWS = ("embedding", "heads", "hidden")  # parts of a model that can become narrower
CAUTION = 2.0  # times the predicted loss of an embedding, which is the furthest below the measured one
HALVINGS = 100  # of the interval in which the price of a parameter is searched


@dataclass
class Plan:
    """What becomes of a model: the input of compress.apply().

    how: how it was chosen, in words.
    shapes: {kind: [Shape of each block]}; matrices that it does not name stay as they are.
    losses: {kind, "heads", "hidden", "wte" or "wpe": [nats per token that are predicted to be lost in each block]}, or {}.
    widths: {"head_qk", "head_v", "n_inner": [of each block]}, or {} where they stay as they are.
    bands: {"wte" or "wpe": bands of a model.Embedding}, or {} where they stay as they are.
    narrow: makes the dense model in these widths and bands, which takes the shapes, and its fisher; None where it is the
        dense model itself.
    fisher: {name of a matrix: F [n, n]} at the outputs of the dense model, for the metric of the fit, or None.
    """

    how: str
    shapes: dict = field(default_factory=dict)
    losses: dict = field(default_factory=dict)
    widths: dict = field(default_factory=dict)
    bands: dict = field(default_factory=dict)
    narrow: Callable | None = None
    fisher: dict | None = None

    def add(self, choice, rows):
        """Take over a Choice with a row of each of its tables."""
        if choice.widths:
            self.losses.setdefault("hidden" if "n_inner" in choice.widths else "heads", []).append(choice.loss)
        for name, width in choice.widths.items():
            self.widths.setdefault(name, []).append(width)
        for (kind, table), row in zip(choice.tables.items(), rows):
            if kind in KINDS:
                self.shapes.setdefault(kind, []).append(table.option(row))
            else:
                self.bands[kind] = table.option(row)
            self.losses.setdefault(kind, []).append(table.losses[row].item())

    def take(self):
        """The dense model in these widths and bands, None where it is the dense model itself, and its fisher. What made them
        takes gigabytes at GPT-2's size and is let go: a plan is applied once."""
        if self.widths and not self.narrow:
            raise ValueError("this plan was applied before")
        narrow, self.narrow = self.narrow, None
        return narrow() if narrow else (None, self.fisher)

    @property
    def loss(self):  # predicted in all, nats per token
        return sum(map(sum, self.losses.values()))


def parse_budget(text, total):
    """A number of parameters such as 82M, 1.5B, 82000000 or, of a model of `total` parameters, 66%."""
    unit = {"K": 10**3, "M": 10**6, "B": 10**9, "%": Decimal(total) / 100}.get(text[-1:].upper())
    try:
        number = int(Decimal(text[:-1]) * unit if unit else Decimal(text))
    except (ArithmeticError, ValueError):
        number = 0
    if number < 1:
        raise UserError(f"--budget takes a number of parameters such as 82M or 66%, not {text}")
    return number


def count_parameters(config, without=()):
    """Number of parameters of a KronyGPTConfig's model in which the matrices of the kinds `without` are dense."""
    with torch.device("meta"):
        shapes = {kind: shapes for kind, shapes in config.shapes.items() if kind not in without}
        return KronyGPT(replace(config, shapes=shapes)).count_parameters()["total"]


def shapes_within(config, limit):
    """Shapes of the MLPs with which a model of a KronyGPTConfig, whose own shapes do not matter, has about `limit`
    parameters.

    Returns:
        [(parameters, Shape of c_fc, multiply-adds of an MLP over dense ones)]: first Krony-PT's, with one factor and all of
        n_embd in A, then low rank, and the others by multiply-adds.
    """
    C, hidden, largest = config.n_embd, config.n_inner[0], int((1 + NEAR) * limit)
    rest, found = count_parameters(config, KINDS) - 2 * config.n_layer * C * hidden, []
    for dim_1, dim_2 in product(*([d for d in range(1, n + 1) if n % d == 0] for n in (C, hidden))):
        m1, n1, m2, n2 = dim_1, dim_2, C // dim_1, hidden // dim_2
        is_low_rank = n1 == m2 == 1 or m1 == n2 == 1

        def size(r):  # each rank counts once, as in KronLinear
            saved = r * r * ((r < C) + (r < hidden)) if is_low_rank else 0  # noqa: B023
            return rest + config.n_layer * (2 * r * (m1 * n1 + m2 * n2) - saved)  # noqa: B023

        r = max(1, bisect_right(range(1, min(m1 * n1, m2 * n2) + 1), largest, key=size))
        if (1 - NEAR) * limit <= size(r) <= largest:
            sides = ((r, m1, n1), (r, m2, n2)), ((r, n1, m1), (r, n2, m2))  # of c_fc, and of c_proj, its mirror image
            macs = sum(min(multiply_adds(*pair).values()) for pair in sides)
            found.append((size(r), Shape(dim_1, dim_2, r), macs / (2 * C * hidden)))
    return sorted(found, key=lambda row: ((row[1].dim_1, row[1].factors) != (C, 1), row[1][:2] != (C, 1), row[2]))


def smallest(config, kinds, narrows=(), step=1):
    """Number of parameters of a KronyGPTConfig's model with the least rank, `step`, in the matrices of some kinds, and with
    the least of what `narrows` names: "embedding", "heads", "hidden"."""
    if "embedding" in narrows:
        config = replace(config, wte=[(config.vocab_size, step)], wpe=[(config.block_size, step)])
    if "heads" in narrows:
        config = replace(config, shapes={}, head_qk=grid(config.head_dim, HEAD_STEPS)[0],
                         head_v=grid(config.head_dim, HEAD_STEPS)[0])
    if "hidden" in narrows:
        config = replace(config, shapes={}, n_inner=[grid(n, HIDDEN_STEPS)[0] for n in config.n_inner])
    sizes = {kind: [config.sizes(layer)[kind] for layer in range(config.n_layer)] for kind in kinds}
    shapes = {kind: [rank_table(m, n, torch.zeros(min(m, n)), step).option(0) for m, n in of_blocks]
              for kind, of_blocks in sizes.items()}
    return count_parameters(replace(config, shapes={**config.shapes, **shapes}))


def room(config, kinds, limit, narrows=(), step=1):
    """How many numbers a budget of parameters leaves for the matrices of some kinds in all blocks together, and for the
    embeddings if "embedding" is in `narrows`.

    Raises:
        UserError: too few for the least rank, `step`, and the narrowest widths, or enough for the dense model.
    """
    total, least = count_parameters(config, kinds), smallest(config, kinds, narrows, step)
    if not least <= limit < total:
        raise UserError(f"a budget of {limit:,} parameters is not between {least:,}, where all is as narrow as can be, and "
                        f"{total:,}, which the dense model has")
    embeddings = (config.vocab_size + config.block_size) * config.n_embd if "embedding" in narrows else 0
    return limit - total + embeddings + sum(m * n for layer in range(config.n_layer)
                                            for kind, (m, n) in config.sizes(layer).items() if kind in kinds)


def is_dense(model):
    """Whether a KronyGPT is a GPT-2: dense matrices and embeddings, heads of the usual width. Others get ranks only."""
    widths = {width for widths in model.config.head_qk + model.config.head_v for width in widths}
    return all(member.is_dense for member in model.members()) and widths == {model.config.head_dim}


def plan_widths(dense, limits, statistics, narrows=NARROWS, kinds=KINDS, step=1):
    """Widths and ranks of a model for some numbers of parameters by predicted loss.

    The attention of each block chooses the widths of its heads and the ranks of its two matrices, its MLP a number of
    hidden units and two ranks, and each embedding a rank or a staircase. Each is free to stay as it is.

    Args:
        dense: a KronyGPT; one that is_dense() unless `narrows` is empty.
        limits: [number of parameters in all], which are never exceeded.
        statistics: calibration.Statistics of the model.
        narrows: what may change beside ranks.
        kinds: names of the matrices of a block whose ranks may change, such as "mlp.c_fc"; all of them unless `narrows` is
            empty. The shapes of the others stay.
        step: ranks are multiples of it.

    Returns:
        [Plan], one for each limit.

    Raises:
        UserError: a limit is too small for any plan, or large enough for the dense model.
    """
    config, parts, plans, blocks, embeddings = dense.config, [], [], [], {}
    spare = [room(config, kinds, limit, narrows, step) for limit in limits]
    if narrows:
        blocks = [Block(dense, layer, statistics, step) for layer in range(config.n_layer)]
        for block in progress(blocks, desc="widths", unit="blocks"):
            parts += block.attention("heads" in narrows), block.mlp("hidden" in narrows)
            glibc("malloc_trim", 0)  # else what was freed between the tables stays: a gigabyte for GPT-2
    else:
        for layer, kind, matrix in dense.matrices():
            if kind in kinds:
                squares = statistics.spectrum(f"transformer.h.{layer}.{kind}", matrix)
                m, n = matrix.weight.shape
                parts.append([Choice({}, n, 0.0, {kind: rank_table(m, n, squares, step)})])
    if "embedding" in narrows:
        found, E, P = statistics, dense.transformer.wte.weight.detach(), dense.transformer.wpe.weight.detach()
        embeddings["wte"] = Staircase(E, (found.frequencies + found.probabilities) / 2,
                                      found.embedding_fisher + found.uncertainty * found.hidden, N_BANDS)
        embeddings["wpe"] = Staircase(P, found.frequencies.new_full((len(P),), 1 / len(P)), found.embedding_fisher)
    for name, staircase in embeddings.items():
        bands, sizes, losses = zip(*staircase.options(step))
        table = Table(torch.tensor(sizes), CAUTION * torch.tensor(losses, dtype=torch.float64), bands.__getitem__)
        parts.append([Choice({}, 0, 0.0, {name: table})])
    biases = sum(config.sizes(layer)[kind][1] for layer in range(config.n_layer) for kind in kinds)  # change with widths
    for limit, numbers in zip(limits, spare):
        free = "widths and ranks" if narrows else "ranks"
        plans.append(plan := Plan(f"{free} for {limit:,} parameters, by predicted loss"))
        for choice, rows in cheapest(parts, numbers + biases):
            plan.add(choice, rows)
        if narrows:
            plan.narrow = partial(narrowed, dense, blocks, plan.widths, embeddings, plan.bands)
        else:
            plan.fisher = statistics.fisher
    return plans


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
        return sum(choice.size + sum(table.sizes[i].item() for table, i in zip(choice.tables.values(), rows))
                   for choice, rows in chosen)

    largest = max(choice.loss + sum(table.losses[0].item() for table in choice.tables.values())
                  for choices in parts for choice in choices)
    low, high = 0.0, 1.0 + len(parts) * largest  # at which nothing is worth a parameter
    for _ in range(HALVINGS):
        price = (low + high) / 2
        low, high = (low, price) if used(choose(price)) <= limit else (price, high)
    chosen = choose(high)
    while True:
        left, best, target = limit - used(chosen), 0.0, None
        for choice, rows in chosen:
            for k, (table, i) in enumerate(zip(choice.tables.values(), rows)):
                size, loss = table.sizes, table.losses
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
    costs = [table.losses + price * table.sizes for table in choice.tables.values()]
    rows = [int(cost.argmin()) for cost in costs]
    return choice.loss + price * choice.size + sum(cost[i].item() for cost, i in zip(costs, rows)), choice, rows
