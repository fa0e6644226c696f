"""A model in another shape: make it, report what that costs each matrix, write it.

The path of every compression, in kron_decompose.py and prune.py:

    new = factorize(dense, shapes, van_loan)            # or another method
    fits = calibrate(dense, new, tokens)                # if there is text
    print_errors(dense, new, fits)
    write(path, dense, new, options, remark, recipe)
"""
import os
from dataclasses import replace

import torch

from kronygpt import checkpoint
from kronygpt.configurator import UserError
from kronygpt.kron import van_loan
from kronygpt.least_squares import share
from kronygpt.tokenizer import GPT2_VOCAB_SIZE
from model import KronyGPT


def reshaped(config, shapes):
    """A KronyGPTConfig with other shapes of some matrices, {name: [Shape of each block]}.

    Raises:
        UserError: shapes that do not fit, or with more factors than a matrix can use.
    """
    config = replace(config, shapes=config.shapes | shapes)
    for name in shapes:
        m, n = config.matrices[name]
        for dim_1, dim_2, r in config.shapes[name]:
            most = min(dim_1 * dim_2, m * n // (dim_1 * dim_2))
            if r > most:
                raise UserError(f"{name}: {r} factors of ({dim_1}, {dim_2}), where a sum of {most} reaches every matrix")
    return config


@torch.no_grad()
def factorize(model, shapes, method):
    """A KronyGPT with other factors, and copies of all other tensors.

    Args:
        model: a KronyGPT, dense or not.
        shapes: {name: [Shape of each block]} of the matrices to factorize; the others stay as they are.
        method: function (W [m, n], dim_1, dim_2, n_factors) -> A [n_factors, dim_1, dim_2], B [n_factors, ...] of one
            matrix, such as van_loan.

    Raises:
        UserError: as in reshaped().
    """
    config = reshaped(model.config, shapes)
    state_dict = {name: p.clone() for name, p in model.state_dict().items()}
    for layer, kind, matrix in model.matrices():
        if kind in shapes:
            name = f"transformer.h.{layer}.{kind}"
            state_dict[f"{name}.A"], state_dict[f"{name}.B"] = method(matrix.weight, *config.shapes[kind][layer])
    state_dict["lm_head.weight"] = state_dict["transformer.wte.weight"]
    return KronyGPT.from_state_dict(config.as_plain_types(), state_dict)


@torch.no_grad()
def reorder_units(model, hidden=None, embd=None):
    """The same function as a KronyGPT with its units in another order, in which their matrices are dense.

    Args:
        model: a KronyGPT.
        hidden: [n_layer, n_inner], the old index of each hidden unit in its new place, or None.
        embd: [C], that of each dimension of the residual stream, or None.
    """
    config = model.config
    dense_shapes = {name: [(m, n, 1)] * config.n_layer for name, (m, n) in config.matrices.items()
                    if embd is not None or name.startswith("mlp.")}
    new = factorize(model, dense_shapes, van_loan)
    for layer, block in enumerate(new.transformer.h):
        fc, proj, attention = block.mlp.c_fc, block.mlp.c_proj, block.attn
        if hidden is not None:
            order = hidden[layer]
            fc.A.data, fc.bias.data, proj.A.data = fc.A[:, :, order], fc.bias[order], proj.A[:, order]
        if embd is not None:
            for reader in attention.c_attn, fc:
                reader.A.data = reader.A[:, embd]
            for writer in attention.c_proj, proj:
                writer.A.data, writer.bias.data = writer.A[:, :, embd], writer.bias[embd]
    if embd is not None:
        norms = [norm for block in new.transformer.h for norm in (block.ln_1, block.ln_2)]
        for module in (*norms, new.transformer.ln_f, new.transformer.wte, new.transformer.wpe):
            for p in module.parameters():
                p.data = p[..., embd]
    return new


@torch.no_grad()
def print_errors(dense, new, fits=None):
    """Print the relative errors of the matrices in which a new model differs from the one that it was made of.

    Args:
        dense, new: KronyGPTs.
        fits: the Fits of a calibration; then errors of the output are shown, too.
    """
    if fits:
        print("relative errors of the weights ‖W - Ŵ‖/‖W‖ and of the output on text, before → after calibration\n"
              f"{'layer':>5}  {'matrix':<11}  {'factors':>7}  {'weights':>17}  {'output':>17}")
        for fit in fits:
            print(f"{fit.layer:>5}  {fit.name:<11}  {fit.n_factors:>7}  "
                  f"{fit.weight_error_before:>7.4f} → {fit.weight_error:>7.4f}  "
                  f"{fit.output_error_before:>7.4f} → {fit.output_error:>7.4f}")
        return
    print(f"{'layer':>5}  {'matrix':<11}  {'factors':>7}  {'error ‖W - Ŵ‖/‖W‖':>18}  {'energy kept':>11}")
    for (layer, kind, old), (_, _, matrix) in zip(dense.matrices(), new.matrices()):
        if kind.startswith("attn.") and torch.equal(old.weight, matrix.weight):  # left as it was
            continue
        error = share((old.weight - matrix.weight).norm(), old.weight.norm())
        print(f"{layer:>5}  {kind:<11}  {len(matrix.A):>7}  {error:>18.4f}  {1 - error**2:>11.1%}")


def write(path, dense, new, options, remark, recipe):
    """Write the checkpoint of a new model made from another, print how much smaller it is, and verify the file.

    Args:
        path: of the .pt file.
        dense, new: KronyGPTs.
        options: {option: value} to keep in it.
        remark: printed behind that.
        recipe: the config file of train.py to go on with, which is printed for models with GPT-2's vocabulary.

    Raises:
        UserError: what was read back is not what was written.
    """
    before, after = dense.count_parameters(), new.count_parameters()
    for name, place in (("mlp", "in the MLPs"), ("total", "in all")):
        print(f"parameters {place}: {before[name]:,} → {after[name]:,} ({after[name] / before[name]:.1%})")
    checkpoint.save(path, new.cpu(), config=options)
    again, _ = checkpoint.load(str(path))
    if not all(torch.equal(p, q) for p, q in zip(new.state_dict().values(), again.state_dict().values(), strict=True)):
        raise UserError(f"{path} does not hold what was written to it", status=1)
    print(f"wrote {path} ({os.path.getsize(path) / 2**20:.0f} MiB), and verified it; {remark}")
    if new.config.vocab_size == GPT2_VOCAB_SIZE:
        print(f"next: python train.py {recipe} --init_from={path}")


@torch.no_grad()
def without_dropped_units(model):
    """The same function as a KronyGPT whose MLPs have only the hidden units that prune.py --dim=hidden kept.

    Where each B of the MLPs is a 1 and zeros along the hidden side, the units at the zeros add nothing: A alone is a dense
    matrix of n_inner / N units. A model of which that is not true is returned as it is.
    """
    config, n = model.config, model.config.shapes["mlp.c_fc"][0].dim_2
    N, kept = config.n_inner // n, []
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
