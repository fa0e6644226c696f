"""A model in another shape: make it, report what that costs each matrix, write it.

    new, fits = apply(dense, plan, text)
    report(dense, new, fits)
    write(path, dense, new, options, recipe)
"""
import os
from pathlib import Path

import torch

from kronygpt import checkpoint, data
from kronygpt.calibration import calibrate, contributions, interleave, statistics
from kronygpt.configurator import UserError
from kronygpt.kron import van_loan
from kronygpt.least_squares import share
from kronygpt.tokenizer import GPT2_VOCAB_SIZE
from model import KronyGPT, Shape, mlp_shapes

HELD_OUT_TOKENS = 32768  # of the validation split, at most, that tell the loss before and after
BATCH_TOKENS = 8192  # in a batch of them
FILE_ROUNDING = 1e-5  # relative error of a matrix that was written and read
RECIPE_BLOCK_SIZE = 1024  # context of the recipes for GPT-2


def apply(dense, plan, text=None):
    """The model that a budget.Plan makes of another.

    Without text, each matrix becomes the nearest of its shape in the Frobenius norm. With text, calibration.calibrate()
    then fits the factors, in the metric of the plan. For shapes that were given, which have none, the hidden units are first
    moved so that the strongest get different columns of A.

    Args:
        dense: a KronyGPT, dense or not.
        plan: a budget.Plan, which serves once.
        text: tokens (windows, T) on the model's device, or None.

    Returns:
        The new KronyGPT, and the [Fit] of calibration, [] without text.
    """
    if text is None:
        return factorize(dense, plan.shapes), []
    goal, fisher = plan.take()
    if fisher is None:
        dense = spread_units(dense, text, plan.shapes["mlp.c_fc"][0].dim_2)
        fisher = statistics(dense, text).fisher
    new = factorize(goal or dense, plan.shapes)
    return new, calibrate(dense, new, text, fisher, goal=goal)


def factorize(model, shapes):
    """A KronyGPT in other shapes, {kind: [Shape of each block]}, by Van Loan's decomposition, with copies of the rest."""
    return with_factors(model, {(layer, kind): van_loan(matrix.weight.detach(), *shapes[kind][layer])
                                for layer, kind, matrix in model.matrices() if kind in shapes})


def with_factors(model, factors):
    """A KronyGPT with other factors, {(layer, kind): (A, B)}, whose shapes may differ, and with copies of other tensors."""
    shapes = {kind: list(of_blocks) for kind, of_blocks in model.config.shapes.items()}
    state_dict = {name: p.clone() for name, p in model.state_dict().items()}
    for (layer, kind), (A, B) in factors.items():
        shapes[kind][layer] = Shape(A.shape[1], A.shape[2], len(A))
        state_dict |= {f"transformer.h.{layer}.{kind}.A": A, f"transformer.h.{layer}.{kind}.B": B}
    return KronyGPT.from_state_dict(dict(model.config.as_plain_types(), shapes=shapes), state_dict)


@torch.no_grad()
def spread_units(model, text, n_groups):
    """The same function as a KronyGPT with dense MLPs whose n_groups strongest hidden units on a text stand apart: each is
    the first of n_inner / n_groups units."""
    new = factorize(model, mlp_shapes(model.config.n_embd, model.config.n_inner[0], [1] * model.config.n_layer))
    for block, scores in zip(new.transformer.h, contributions(model, text)):
        fc, proj, order = block.mlp.c_fc, block.mlp.c_proj, interleave(scores, n_groups)
        fc.A.data, fc.bias.data, proj.A.data = fc.A[:, :, order], fc.bias[order], proj.A[:, order]
    return new


@torch.no_grad()
def report(dense, new, fits=()):
    """Print the relative errors of the matrices in which a new KronyGPT differs from the one that it was made of.

    Args:
        fits: the Fits of a calibration; then errors of the output are shown, too.
    """
    what, heads = "relative errors of the weights ‖W - Ŵ‖/‖W‖", ["weights"]
    rows = [(layer, kind, len(matrix.A), f"{share((old.weight - matrix.weight).norm(), old.weight.norm()):.4f}")
            for (layer, kind, old), (_, _, matrix) in zip(dense.matrices(), new.matrices())
            if not fits and not torch.equal(old.weight, matrix.weight)]
    if not fits and not rows:
        return
    if fits:
        what, heads = f"{what} and of the output on text, before → after calibration", ["weights", "output"]
        rows = [(fit.layer, fit.name, fit.n_factors, f"{fit.weight_error_before:.4f} → {fit.weight_error:.4f}",
                 f"{fit.output_error_before:.4f} → {fit.output_error:.4f}") for fit in fits]
    print(what)
    for layer, kind, n_factors, *errors in [("block", "matrix", "factors", *heads), *rows]:
        print(f"{layer:>5}  {kind:<11}  {n_factors:>7}", *(f"{error:>17}" for error in errors), sep="  ")


def report_loss(dense, new, tokens, plan):
    """Print the losses of two KronyGPTs on windows that are spread evenly over an array of tokens, beside what a budget.Plan
    predicts."""
    T = dense.config.block_size
    starts = data.even_starts(len(tokens), T, max(1, min(len(tokens), HELD_OUT_TOKENS) // T))
    windows = [(start, start + 1, start + T) for start in starts]
    before, after = (data.mean_loss(model.eval(), tokens, windows, max(1, BATCH_TOKENS // T)) for model in (dense, new))
    predicted = f" (predicted, order only: {plan.loss:.3g})" if plan.losses else ""
    print(f"loss on {len(windows) * (T - 1):,} held-out tokens: {before:.4f} → {after:.4f} nats per token, "
          f"{after - before:.4f} added{predicted}")


def write(path, dense, new, options, recipe):
    """Write the checkpoint of a new model made from another, verify the file, and print how much smaller the model is.

    Args:
        path: of the .pt file.
        dense, new: KronyGPTs.
        options: {option: value} to keep in it.
        recipe: the config file of train.py to go on with, which is printed for models of GPT-2's vocabulary and context.

    Raises:
        UserError: what was read back is not what was written.
    """
    before, after = dense.count_parameters(), new.count_parameters()
    for name, place in (("mlp", "in the MLPs"), ("total", "in all")):
        print(f"parameters {place}: {before[name]:,} → {after[name]:,} ({after[name] / before[name]:.1%})")
    checkpoint.save(path, new.cpu(), config=options)
    again, _ = checkpoint.load(str(path), as_stored=True)
    if not is_same(new, again):
        raise UserError(f"{path} does not hold what was written to it", status=1)
    print(f"wrote {path} ({os.path.getsize(path) / 2**20:,.1f} MiB), and verified it")
    if (new.config.vocab_size, new.config.block_size) == (GPT2_VOCAB_SIZE, RECIPE_BLOCK_SIZE):
        print(f"next: python train.py {recipe} --init_from={path} --out_dir=out/{Path(path).stem}")


@torch.no_grad()
def is_same(model, other):
    """Whether two KronyGPTs on the CPU are equal, matrices up to the rounding of a file, which stores each rank once."""
    p, q = ({name: t for name, t in m.state_dict().items() if not name.endswith((".A", ".B"))} for m in (model, other))
    return model.config == other.config and all(torch.equal(t, q[name]) for name, t in p.items()) and all(
        (W - V).norm() <= FILE_ROUNDING * W.norm() for W, V in zip(model.weights(), other.weights()))


@torch.no_grad()
def without_dropped_units(model):
    """The same function as a KronyGPT whose MLPs have only the hidden units that prune.py --dim=hidden kept.

    Where each B of the MLPs is a 1 and zeros along the hidden side, the units at the zeros add nothing: A alone is a dense
    matrix of n_inner / N units. A model of which that is not true is returned as it is.
    """
    config, n = model.config, model.config.shapes["mlp.c_fc"][0].dim_2
    N, kept = config.n_inner[0] // n, []
    for block, fc, proj in zip(model.transformer.h, config.shapes["mlp.c_fc"], config.shapes["mlp.c_proj"]):
        B = block.mlp.c_fc.B.flatten()
        if (N == 1 or fc != (config.n_embd, n, 1) or proj != (n, config.n_embd, 1)
                or B.count_nonzero() != 1 or B.max() != 1 or not torch.equal(B, block.mlp.c_proj.B.flatten())):
            return model
        kept.append(B.argmax().item())
    state_dict = dict(model.state_dict())
    for layer, offset in enumerate(kept):
        name = f"transformer.h.{layer}.mlp"
        state_dict[f"{name}.c_fc.bias"] = state_dict[f"{name}.c_fc.bias"][offset::N].contiguous()
        for matrix in "c_fc", "c_proj":
            state_dict[f"{name}.{matrix}.B"] = state_dict[f"{name}.c_fc.bias"].new_ones(1, 1, 1)
    attention = {name: shapes for name, shapes in config.shapes.items() if not name.startswith("mlp.")}
    return KronyGPT.from_state_dict(dict(config.as_plain_types(), n_inner=n, shapes=attention), state_dict).eval()
