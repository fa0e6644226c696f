"""Compress a GPT-2: its matrices as low rank or as sums of Kronecker products.

    python kron_decompose.py --budget=82M --calibrate=openwebtext  # the whole model in 82M → checkpoints/best_82M.pt
    python kron_decompose.py --budget=82M --calibrate=openwebtext --matrices=mlp   # ... attention stays dense
    python kron_decompose.py --budget=82M --calibrate=openwebtext --keep=heads     # ... heads keep their width
    python kron_decompose.py --budget=96M               # prints the shapes of the MLPs that make a 96M model
    python kron_decompose.py dim_1 dim_2 n_factors      # Van Loan's sum → checkpoints/VL_{dim_1}_{dim_2}_{n_factors}.pt
    python kron_decompose.py 256 64 16,16,10,10,10,10,10,10,10,10,10,10     # a number of factors for each block
    python kron_decompose.py 768 768 1 --calibrate=openwebtext     # → checkpoints/calibrated_....pt

With --budget and --calibrate, each block gets its own widths of heads, number of hidden units, and ranks: those with the
smallest predicted rise of the loss on the text. A rank counts once: a matrix [m, n] of rank r has r (m + n - r) numbers in
the file. dim_1, dim_2 and n_factors instead are one shape for all MLPs: dim_1 divides n_embd, dim_2
divides 4 n_embd, and they are the sides of A in c_fc. c_proj has the mirror image.

Van Loan's decomposition is the nearest to the weights. With --calibrate the factors are then fitted to what the weights do
to the text of a data set, one matrix after the other, and errors that raise the loss more count more. This keeps far more
of what the model has learnt. It takes minutes, and a GPU helps.
"""
import time
from dataclasses import replace

from kronygpt import configurator
from kronygpt.configurator import UserError, check_choice, run

init_from = "gpt2"  # the model to compress: a hub name, a Hugging Face directory or a checkpoint
out: str | None = None  # file to write; default: checkpoints/best_....pt, VL_....pt or calibrated_....pt
budget = "82M"  # total number of parameters, of the whole model or for the table of shapes
matrices = "all"  # matrices that share the budget: all, or mlp for those of the MLPs
keep = ""  # comma list of what stays as it is under --budget: embedding, heads, hidden
calibrate: str | None = None  # data set under data/: its training split is calibrated on, its validation split scored
calibration_tokens = 131072  # number of tokens to calibrate on
device = ""  # where to calibrate; default: CUDA if available, else the CPU

GPT2_SIZES = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}
SHOWN = 20  # rows that are printed


def parse_shapes(dim_1, dim_2, n_factors, config):
    """The positional arguments as the shapes of the MLPs, which fit a KronyGPTConfig."""
    from model import mlp_shapes

    try:
        factors = [int(n) for n in n_factors.split(",")]
        shapes = mlp_shapes(int(dim_1), int(dim_2), factors * config.n_layer if len(factors) == 1 else factors)
        replace(config, shapes=shapes)  # which checks them
    except ValueError as error:
        raise UserError(f"dim_1, dim_2 and n_factors (perhaps a comma list): {error}") from None
    a, b = int(dim_1) * int(dim_2), config.n_embd * config.n_inner[0] // (int(dim_1) * int(dim_2))
    if (most := max(factors)) > min(a, b):
        raise UserError(f"{most} factors of ({dim_1}, {dim_2}), where a sum of {min(a, b)} reaches every matrix")
    return shapes


def print_table(shapes):
    """Print the first of some budget.MLPShapes."""
    print(f"{'parameters':>12}  dim_1  dim_2  factors  multiply-adds of an MLP  rank, at most")
    for s in shapes[:SHOWN]:
        print(f"{s.parameters:>12,}  {s.dim_1:>5}  {s.dim_2:>5}  {s.n_factors:>7}  {s.multiply_adds:>16.2f} × dense  "
              f"{s.rank:>13}")
    if len(shapes) > SHOWN:
        print(f"... and {len(shapes) - SHOWN} more with as many multiply-adds or more")


def print_plan(plan):
    """Print the widths and ranks of a budget.Plan, block by block, and the loss that they are predicted to add."""
    ranks = {kind: [s.factors if s.dim_2 == 1 else "dense" for s in shapes] for kind, shapes in plan.shapes.items()}
    columns = {name: [" ".join(map(str, width)) if isinstance(width, list) else width for width in widths]
               for name, widths in plan.widths.items()} | ranks
    space = {name: max(len(str(text)) for text in (name, *column)) for name, column in columns.items()}
    print(f"{plan.how}\nblock  " + "  ".join(f"{name:>{width}}" for name, width in space.items()))
    for layer, row in enumerate(zip(*columns.values())):
        print(f"{layer:>5}  " + "  ".join(f"{text:>{width}}" for text, width in zip(row, space.values())))
    for name, bands in plan.bands.items():
        print(f"{name}: " + ", ".join(f"{rows} × {columns}" for rows, columns in bands))
    parts = ", ".join(f"{name} {sum(losses):.4f}" for name, losses in plan.losses.items())
    print("each rank counts once: r (m + n - r) numbers are in the file for a matrix [m, n] of rank r\n"
          f"predicted loss added (order only): {plan.loss:.4f} nats per token: {parts}")


def sizes_of(source):
    """The KronyGPTConfig of a model, which OpenAI's four need not be downloaded for."""
    from kronygpt import checkpoint
    from model import KronyGPTConfig

    if source not in GPT2_SIZES:
        return checkpoint.load(source)[0].config
    n_layer, n_embd = GPT2_SIZES[source]
    return KronyGPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // checkpoint.GPT2_HEAD_DIM)


def main(dim_1=None, dim_2=None, n_factors=None):
    from kronygpt import calibration, checkpoint, compress, data
    from kronygpt.budget import NARROWS, Plan, is_dense, parse_budget, plan_ranks, plan_widths, room, shapes_within
    from kronygpt.files import output_file
    from model import KINDS

    limit, largest = parse_budget(budget)
    check_choice(globals(), "matrices", "all", "mlp")
    kept = keep.split(",") if keep else []
    if unknown := set(kept) - set(NARROWS):
        raise UserError(f"--keep is a comma list of {', '.join(NARROWS)}, not {min(unknown)}")
    if dim_1 and (not n_factors or "budget" in configurator.given):
        raise UserError("give all three of dim_1 dim_2 n_factors, or a --budget without them")
    if not (dim_1 or calibrate):
        return print_table(shapes_within(sizes_of(init_from), limit, largest))

    dense, _ = checkpoint.load(init_from)
    config, options, start = dense.config, dict(init_from=init_from), time.perf_counter()
    if dim_1:
        name = f"{'calibrated' if calibrate else 'VL'}_{dim_1}_{dim_2}_{n_factors.replace(',', '-')}"
        plan = Plan("one shape for all MLPs", parse_shapes(dim_1, dim_2, n_factors, config))
    else:
        name, kinds = f"best_{budget}", [kind for kind in KINDS if matrices == "all" or kind.startswith("mlp.")]
        is_whole = matrices == "all" and is_dense(dense)  # else ranks alone are chosen
        narrows = [part for part in NARROWS if is_whole and part not in kept]
        room(config, kinds, limit, narrows)  # an error comes before the work
        options |= dict(budget=budget, matrices=matrices, keep=keep)
    path = output_file(out or f"checkpoints/{name}.pt")
    text = None
    if calibrate:
        text = data.calibration_text(calibrate, calibration_tokens, config, device)
        held_out = data.load_tokens(calibrate, "val", config, config.block_size)
        dense.to(text.device)
        options |= dict(calibrate=calibrate, calibration_tokens=calibration_tokens)
    if not dim_1:
        found = calibration.statistics(dense, text)
        plan = plan_widths(dense, [limit], found, narrows)[0] if is_whole else plan_ranks(dense, kinds, limit, found)
        print_plan(plan)
    new, fits = compress.apply(dense, plan, text)
    compress.report(dense, new, fits)
    print(f"compressed in {time.perf_counter() - start:.1f} s")
    if calibrate:
        compress.report_loss(dense, new, held_out, plan)
    compress.write(path, dense, new, options, "config/train_gpt2.py" if dim_1 else "config/train_gpt2_budget.py")


if __name__ == "__main__":
    run(main)
