"""The pruning initialisation: keep one in N rows of the MLP matrices, as a Kronecker product with zeros and a one.

    python prune.py                     # Krony-PT's: c_fc's even rows, c_proj's even columns → checkpoints/prune_384_3072.pt
    python prune.py --offset=1          # the odd ones
    python prune.py --keep=4            # one in four
    python prune.py --dim=hidden        # hidden units: c_fc's columns and c_proj's rows
    python prune.py --epsilon=0.01      # let the others learn
    python prune.py --dim=layer         # whole blocks, every other one, as DistilGPT2 began → checkpoints/layers_2_0.pt
    python prune.py --dim=hidden --select=norm                                      # the units of the largest weights
    python prune.py --dim=hidden --select=contribution --refit=True --calibrate=openwebtext

What is kept is every second unit, or with --select=norm or contribution the ones that matter most, by the weights or by
what they add on real text; they come to the even places first, which changes nothing in the model. --refit fits what is
kept by least squares to what all units did on real text.

What is kept is A; B = [1, 0]ᵀ puts it into the even rows, so that the model starts as the pruned one and is trained on
from there as a KronyGPT with (dim_1, dim_2) = (n_embd / N, 4 n_embd), or (n_embd, 4 n_embd / N) along the hidden side.
"""
import math
import re

from configurator import UsageError, run

init_from = "gpt2"  # what is pruned: a hub name, a Hugging Face directory or a checkpoint
out: str | None = None  # the file to write, in the place of checkpoints/prune_....pt
dim = "embd"  # what is dropped: units of the side embd or hidden of the MLPs, or whole blocks: layer
keep = 2  # one in so many is kept
offset = 0  # which one of them: 0 for even, 1 for odd
select = "even"  # what is kept: even (those at the offset), odd, or the largest by norm or contribution
refit = False  # fit what is kept to real text, by least squares
calibrate: str | None = None  # the data set under data/ of that text
calibration_tokens = 32768  # how many of its tokens
device = ""  # of the calibration: cuda, cpu, ...: what there is if left out
epsilon = 0.0  # what stands in B in the place of the zeros; the gradient of a zero is not zero, but its effect is

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
    if n_factors != 1:
        raise ValueError("pruning makes one Kronecker product")
    m2, n2 = W.shape[0] // dim_1, W.shape[1] // dim_2
    B = W.new_full((1, m2, n2), epsilon)
    B.view(-1)[offset] = 1.0
    row, column = divmod(offset, n2)
    return W[row::m2, column::n2].contiguous()[None], B


def select_units(model, text):
    """The model with its strongest units in the places that are kept."""
    from calibration import contributions, interleave, norms, reordered

    hidden, embd = contributions(model.to(text.device), text) if select == "contribution" else norms(model)
    if dim == "embd":
        return reordered(model, embd=interleave(embd, len(embd) // keep, keep))
    return reordered(model, hidden=[interleave(scores, len(scores) // keep, keep) for scores in hidden])


def without_layers(model):
    """The model with one block in `keep`. The start of DistilGPT2 (V. Sanh et al., DistilBERT, arXiv 1910.01108)."""
    kept = range(offset, model.config.n_layer, keep)
    model_args = dict(model.model_args(), n_layer=len(kept), factors=[model.config.factors[layer] for layer in kept])
    names = {f"transformer.h.{old}.": f"transformer.h.{new}." for new, old in enumerate(kept)}
    state_dict = {}
    for name, p in model.state_dict().items():
        block = BLOCK.match(name)
        if not block:
            state_dict[name] = p
        elif block[0] in names:
            state_dict[names[block[0]] + name[block.end():]] = p
    return model.from_state_dict(model_args, state_dict)


def check_options():
    if dim not in ("embd", "hidden", "layer"):
        raise UsageError(f"--dim is embd, hidden or layer, not {dim}")
    if dim == "layer" and (select != "even" or refit or epsilon):
        raise UsageError("--dim=layer drops whole blocks: it goes with --keep and --offset, not with --select, --refit or "
                         "--epsilon")
    if keep < 2 or not 0 <= offset < keep:
        raise UsageError(f"--keep is at least 2 and --offset from 0 to keep - 1, not {keep} and {offset}")
    if not math.isfinite(epsilon):
        raise UsageError(f"--epsilon is a finite number, not {epsilon}")
    if select not in ("even", "odd", "norm", "contribution"):
        raise UsageError(f"--select is even, odd, norm or contribution, not {select}")
    if offset and select != "even":
        raise UsageError(f"--offset goes with --select=even, not {select}")
    needs_text = refit or select == "contribution"
    if needs_text and not calibrate:
        raise UsageError("--refit and --select=contribution need text: name a data set with --calibrate")
    if calibrate and not needs_text:
        raise UsageError("--calibrate is for --refit=True or --select=contribution")


def main():
    from functools import partial

    import checkpoint

    check_options()
    model, _ = checkpoint.load(init_from)
    if dim == "layer":
        if offset >= model.config.n_layer:
            raise UsageError(f"--offset={offset} leaves no block of {model.config.n_layer}")
        path = out or f"checkpoints/layers_{keep}_{offset}.pt"
        checkpoint.check_is_file(path)
        config = dict(init_from=init_from, dim=dim, keep=keep, offset=offset)
        checkpoint.save_compressed(model, without_layers(model), path, config,
                                   f"its blocks are {', '.join(map(str, range(offset, model.config.n_layer, keep)))}")
        return print(f"next: python train.py config/train_gpt2.py --init_from={path}")
    dim_1, dim_2 = model.config.n_embd, model.config.n_hidden
    if (dim_1 if dim == "embd" else dim_2) % keep:
        raise UsageError(f"--keep={keep} does not divide the {dim_1 if dim == 'embd' else dim_2} units of --dim={dim}")
    dim_1, dim_2 = (dim_1 // keep, dim_2) if dim == "embd" else (dim_1, dim_2 // keep)
    kept = 1 if select == "odd" else offset
    remarks = (f"offset{kept}" * bool(kept), select * (select in ("norm", "contribution")), "refit" * refit)
    path = out or "_".join(("checkpoints/prune", str(dim_1), str(dim_2), *filter(None, remarks))) + ".pt"
    approximate = partial(prune_matrix, offset=kept, epsilon=epsilon)
    config = dict(init_from=init_from, dim=dim, keep=keep, offset=kept, epsilon=epsilon, select=select, refit=refit,
                  calibrate=calibrate, calibration_tokens=calibration_tokens)
    shape = dim_1, dim_2, [1] * model.config.n_layer, approximate
    checkpoint.check_is_file(path)
    if calibrate:
        from calibration import calibration_text

        text, _ = calibration_text(calibrate, calibration_tokens, model.config, device)
    if select in ("norm", "contribution"):
        model = select_units(model, text if calibrate else None)
    if refit:
        from calibration import save_calibrated

        save_calibrated(model, text, path, config, *shape, fixed_B=True, reorder=False)
    else:
        checkpoint.save_refactored(model.cpu(), *shape, path, config)
    print(f"next: python train.py config/train_gpt2_96m.py --init_from={path}")


if __name__ == "__main__":
    run(main)
