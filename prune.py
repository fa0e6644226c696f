"""Pruning as initialization: keep one in N rows of the MLP matrices, as a Kronecker product with zeros and a one.

    python prune.py                     # Krony-PT's: c_fc's even rows, c_proj's even columns → checkpoints/prune_384_3072.pt
    python prune.py --offset=1          # the odd ones
    python prune.py --keep=4            # one in four
    python prune.py --dim=hidden        # hidden units: c_fc's columns and c_proj's rows
    python prune.py --epsilon=0.01      # 0.01 in B in place of the zeros
    python prune.py --dim=hidden --select=contribution --refit=True --calibrate=openwebtext

A holds the kept rows, and B = [1, 0]ᵀ puts them into the even places: the model starts as the pruned one and is trained
further as a KronyGPT with (dim_1, dim_2) = (n_embd / N, 4 n_embd), or (n_embd, 4 n_embd / N) along the hidden side.

--select=contribution keeps the hidden units that add most on real text: they are first moved to the even places, which
leaves the model's function unchanged. --refit fits the kept units by least squares to the output of all units on real
text. As long as B is 1 and zeros, kron_to_gpt.py writes a model of --dim=hidden as a GPT-2 of the kept units alone, with
n_inner = 4 n_embd / N.
"""
from kronygpt.configurator import UserError, check_choice, run

init_from = "gpt2"  # the model to prune: a hub name, a Hugging Face directory or a checkpoint
out: str | None = None  # file to write; default: checkpoints/prune_....pt
dim = "embd"  # side of the MLPs whose units are dropped: embd or hidden
keep = 2  # keep one in N
offset = 0  # position of the kept one among N: 0 for even, 1 for odd
select = "even"  # units to keep: even (those at the offset), or by contribution, with --dim=hidden
refit = False  # fit the kept units to real text, by least squares
calibrate: str | None = None  # data set under data/ for --refit and --select=contribution
calibration_tokens = 131072  # number of its tokens
device = ""  # where to calibrate; default: CUDA if available, else Apple's mps, else the CPU
epsilon = 0.0  # value in B in place of the zeros


def prune_matrix(W, dim_1, dim_2, offset=0, epsilon=0.0):
    """W [m, n] with all but one in N rows (or columns) dropped, as one Kronecker product.

    Args:
        dim_1, dim_2: rows and columns of A: (m / N, n) to drop rows, (m, n / N) to drop columns.

    Returns:
        A [1, dim_1, dim_2], the kept rows (columns), and B [1, m/dim_1, n/dim_2], 1 at offset and epsilon elsewhere.
    """
    m2, n2 = W.shape[0] // dim_1, W.shape[1] // dim_2
    B = W.new_full((1, m2, n2), epsilon)
    B.view(-1)[offset] = 1.0
    row, column = divmod(offset, n2)
    return W[row::m2, column::n2].contiguous()[None], B


def check_options(config):
    """Raise UserError for options that do not go together, of which one would have no effect."""
    check_choice(globals(), "dim", "embd", "hidden")
    check_choice(globals(), "select", "even", "contribution")
    n_units = config.n_embd if dim == "embd" else config.n_inner[0]
    if keep < 2 or not 0 <= offset < keep:
        raise UserError("--keep is at least 2, and --offset from 0 to keep - 1")
    if n_units % keep:
        raise UserError(f"--keep={keep} must divide the {n_units} units of --dim={dim}")
    if select == "contribution" and (dim != "hidden" or offset):
        raise UserError("--select=contribution goes with --dim=hidden, without --offset")
    if bool(calibrate) != (refit or select == "contribution"):
        raise UserError("--refit and --select=contribution, and nothing else, go with --calibrate")


def main():
    from kronygpt import calibration, checkpoint, compress, data
    from kronygpt.files import output_file

    dense, rest = checkpoint.load(init_from)
    config = dense.config
    check_options(config)
    dim_1, dim_2 = config.n_embd // (keep if dim == "embd" else 1), config.n_inner[0] // (keep if dim == "hidden" else 1)
    remarks = {f"offset{offset}": offset, select: select != "even", "refit": refit}
    name = "_".join((f"prune_{dim_1}_{dim_2}", *(remark for remark, holds in remarks.items() if holds)))
    path = output_file(out or f"checkpoints/{name}.pt")
    options = dict(init_from=init_from, dim=dim, keep=keep, offset=offset, epsilon=epsilon, select=select, refit=refit,
                   calibrate=calibrate, calibration_tokens=calibration_tokens, init_options=rest["config"])
    sides = {"mlp.c_fc": (dim_1, dim_2), "mlp.c_proj": (dim_2, dim_1)}
    if calibrate:
        text = data.calibration_text(calibrate, calibration_tokens, config, device)
        dense.to(text.device)
    if select == "contribution":  # the strongest units take the places that are kept
        dense = compress.spread_units(dense, text, dim_2)
    new = compress.with_factors(dense, {
        (layer, kind): prune_matrix(matrix.weight.detach(), *sides[kind], offset, epsilon)
        for layer, kind, matrix in dense.matrices() if kind in sides})
    compress.report(dense, new, calibration.calibrate(dense, new, text, fixed_B=True) if refit else [])
    compress.write(path, dense, new, options, "config/train_gpt2.py" if dim == "hidden" else "config/train_gpt2_96m.py")


if __name__ == "__main__":
    run(main)
