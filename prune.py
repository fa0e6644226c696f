"""Pruning as initialisation: keep one in N rows of the MLP matrices, as a Kronecker product with zeros and a one.

    python prune.py                     # Krony-PT's: c_fc's even rows, c_proj's even columns → checkpoints/prune_384_3072.pt
    python prune.py --offset=1          # the odd ones
    python prune.py --keep=4            # one in four
    python prune.py --dim=hidden        # hidden units: c_fc's columns and c_proj's rows
    python prune.py --dim=hidden --plain=True       # the kept units alone: a plain GPT-2 of a smaller n_inner
    python prune.py --epsilon=0.01      # let the dropped rows learn
    python prune.py --dim=layer         # whole blocks, every other one, as DistilGPT2 began → checkpoints/layers_2_0.pt
    python prune.py --dim=hidden --select=norm                                      # the units of the largest weights
    python prune.py --dim=hidden --select=contribution --refit=True --calibrate=openwebtext

By default every second unit is kept; --select=norm or contribution keeps the units that matter most, by their weights or
by what they add on real text (they are first moved to the even places, which leaves the model's function unchanged).
--refit fits the kept units by least squares to the output of all units on real text.

A holds the kept rows, and B = [1, 0]ᵀ puts them into the even places: the model starts as the pruned one and is trained
further as a KronyGPT with (dim_1, dim_2) = (n_embd / N, 4 n_embd), or (n_embd, 4 n_embd / N) along the hidden side.

--dim=hidden --plain=True writes the kept units without B, as a dense model with n_inner = 4 n_embd / N. Training it is
training with a fixed B, and its export is a GPT-2 with MLPs of one Nth of the size, for every program that reads GPT-2.
"""
import re
from functools import partial

from kronygpt.configurator import UserError, check_choice, check_range, run
from kronygpt.files import check_is_file

init_from = "gpt2"  # the model to prune: a hub name, a Hugging Face directory or a checkpoint
out: str | None = None  # file to write; default: checkpoints/prune_....pt
dim = "embd"  # units to drop: embd or hidden (a side of the MLPs), or layer (whole blocks)
keep = 2  # keep one in N
offset = 0  # position of the kept one among N: 0 for even, 1 for odd
select = "even"  # units to keep: even (those at the offset), odd, or the largest by norm or contribution
refit = False  # fit the kept units to real text, by least squares
calibrate: str | None = None  # data set under data/ for --refit and --select=contribution
calibration_tokens = 131072  # number of its tokens
device = ""  # of the calibration; default: CUDA if available, else the CPU
epsilon = 0.0  # value in B in place of the zeros
plain = False  # with --dim=hidden: write the kept units as dense matrices of a smaller n_inner, without B

RECIPE = "config/train_gpt2_96m.py"
BLOCK = re.compile(r"transformer\.h\.\d+\.")


def prune_matrix(W, dim_1, dim_2, n_factors, offset=0, epsilon=0.0):
    """W with all but one in N rows (or columns) dropped, as one Kronecker product.

    Args:
        W: [m, n].
        dim_1: rows of A: m, or m / N to drop rows.
        dim_2: columns of A: n, or n / N to drop columns.
        n_factors: 1.
        offset: of the one that is kept, among N.
        epsilon: what B holds for the others.

    Returns:
        A [1, dim_1, dim_2], the kept rows (columns), and B [1, m/dim_1, n/dim_2], 1 at offset and epsilon elsewhere.
    """
    m2, n2 = W.shape[0] // dim_1, W.shape[1] // dim_2
    B = W.new_full((1, m2, n2), epsilon)
    B.view(-1)[offset] = 1.0
    row, column = divmod(offset, n2)
    return W[row::m2, column::n2].contiguous()[None], B


def without_layers(model):
    """The model with one block in `keep`. The start of DistilGPT2 (V. Sanh et al., DistilBERT, arXiv 1910.01108)."""
    kept = range(offset, model.config.n_layer, keep)
    args = model.config.as_plain_types()
    shapes = {name: [of_blocks[layer] for layer in kept] for name, of_blocks in args["shapes"].items()}
    names = {f"transformer.h.{old}.": f"transformer.h.{new}." for new, old in enumerate(kept)}
    state_dict = {}
    for name, p in model.state_dict().items():
        block = BLOCK.match(name)
        if not block:
            state_dict[name] = p
        elif block[0] in names:
            state_dict[names[block[0]] + name[block.end():]] = p
    return model.from_state_dict(dict(args, n_layer=len(kept), shapes=shapes), state_dict)


def check_options():
    check_choice(globals(), "dim", "embd", "hidden", "layer")
    check_choice(globals(), "select", "even", "odd", "norm", "contribution")
    check_range(globals(), "epsilon", at_least=-1, at_most=1)  # the kept one has 1
    check_range(globals(), "keep calibration_tokens", at_least=1, at_most=10**9)
    if dim == "layer" and (select != "even" or refit or epsilon):
        raise UserError("--dim=layer drops whole blocks: it goes with --keep and --offset, not with --select, --refit or "
                         "--epsilon")
    if plain and (dim != "hidden" or epsilon):
        raise UserError("--plain=True goes with --dim=hidden, and not with --epsilon")
    if keep < 2 or not 0 <= offset < keep:
        raise UserError(f"--keep is at least 2 and --offset from 0 to keep - 1, not {keep} and {offset}")
    if offset and select != "even":
        raise UserError(f"--offset goes with --select=even, not {select}")
    needs_text = refit or select == "contribution"
    if needs_text and not calibrate:
        raise UserError("--refit and --select=contribution need text: name a data set with --calibrate")
    if calibrate and not needs_text:
        raise UserError("--calibrate is for --refit=True or --select=contribution")


def main():
    from kronygpt import calibration, checkpoint, compress, data
    from model import mlp_shapes

    check_options()
    dense, _ = checkpoint.load(init_from)
    config = dense.config
    n_units = {"embd": config.n_embd, "hidden": config.n_inner}.get(dim)
    if dim == "layer" and offset >= config.n_layer:
        raise UserError(f"--offset={offset} leaves no block of {config.n_layer}")
    if n_units and n_units % keep:
        raise UserError(f"--keep={keep} does not divide the {n_units} units of --dim={dim}")
    dim_1 = config.n_embd // (keep if dim == "embd" else 1)
    dim_2 = config.n_inner // (keep if dim == "hidden" else 1)
    kept = 1 if select == "odd" else offset
    remarks = (f"offset{kept}" * bool(kept), select * (select in ("norm", "contribution")), "refit" * refit)
    name = "_".join(("prune" if not plain else "plain", str(dim_1), str(dim_2), *filter(None, remarks)))
    path = out or f"checkpoints/{name if n_units else f'layers_{keep}_{offset}'}.pt"
    check_is_file(path)
    options = dict(init_from=init_from, dim=dim, keep=keep, offset=kept, plain=plain)

    fits = None
    if dim == "layer":
        new = without_layers(dense)
        blocks = ", ".join(map(str, range(offset, config.n_layer, keep)))
        compress.write(path, dense, new, options, f"its blocks are {blocks}", RECIPE)
    else:
        options |= dict(epsilon=epsilon, select=select, refit=refit, calibrate=calibrate,
                        calibration_tokens=calibration_tokens)
        if calibrate:
            text = data.calibration_text(calibrate, calibration_tokens, config, device)
            dense.to(text.device)
        if select in ("norm", "contribution"):  # the strongest units take the places that are kept
            hidden, embd = calibration.contributions(dense, text) if select == "contribution" else calibration.norms(dense)
            order = [calibration.interleave(scores, len(scores) // keep, keep) for scores in (*hidden, embd)]
            dense = compress.reorder_units(dense, **({"hidden": order[:-1]} if dim == "hidden" else {"embd": order[-1]}))
        shapes = mlp_shapes(dim_1, dim_2, [1] * config.n_layer)
        new = compress.factorize(dense, shapes, partial(prune_matrix, offset=kept, epsilon=epsilon))
        if refit:
            fits = calibration.calibrate(dense, new, text, fixed_B=True)
        compress.print_errors(dense, new, fits)
        new = compress.without_dropped_units(new) if plain else new
        compress.write(path, dense, new, options, f"one in {keep} units of the side {dim} kept", RECIPE)


if __name__ == "__main__":
    run(main)
