"""Compress a GPT-2: its matrices as low rank or as sums of Kronecker products.

    python kron_decompose.py --budget=82M --calibrate=openwebtext  # the whole model in 82M → checkpoints/best_82M.pt
    python kron_decompose.py --budget=96M,82M,67M --calibrate=openwebtext --plan_only=True     # what each would cost, first
    python kron_decompose.py --budget=82M --calibrate=openwebtext --keep=embedding # ... the embeddings stay as they are
    python kron_decompose.py --budget=82M --calibrate=openwebtext --matrices=mlp   # ... ranks of the MLPs alone
    python kron_decompose.py --budget=96M               # prints the shapes of the MLPs that make a 96M model
    python kron_decompose.py dim_1 dim_2 n_factors      # Van Loan's sum → checkpoints/VL_{dim_1}_{dim_2}_{n_factors}.pt
    python kron_decompose.py 256 64 16,16,10,10,10,10,10,10,10,10,10,10     # a number of factors for each block
    python kron_decompose.py 768 768 1 --calibrate=openwebtext     # → checkpoints/calibrated_....pt

With --budget and --calibrate, each head gets its own widths, each MLP a number of hidden units, each matrix and embedding a
rank, and rare tokens fewer numbers than frequent ones. The predicted rise of the loss on the text decides all of them. A
rank counts once: a matrix [m, n] of rank r has r (m + n - r) numbers in the file. Several budgets share the work, and
checkpoints/plan.png shows what they are predicted to cost.

dim_1, dim_2 and n_factors give all MLPs one shape. dim_1 and dim_2 are the rows and columns of A in c_fc, and divide n_embd
and 4 n_embd. c_proj has the mirror image.

Van Loan's decomposition is the nearest to the weights. With --calibrate the factors are then fitted to what the weights do
to the text of a data set, one matrix after the other, and errors that raise the loss more count more. This keeps far more
of what the model has learned. It takes minutes, and a GPU helps.
"""
import time
from dataclasses import replace

from kronygpt import configurator
from kronygpt.configurator import UserError, check_choice, run

init_from = "gpt2"  # the model to compress: a hub name, a Hugging Face directory or a checkpoint
out: str | None = None  # file to write; default: checkpoints/best_....pt, VL_....pt or calibrated_....pt
budget = "82M"  # total number of parameters, such as 82M or 66%, or a comma list of them
plan_only = False  # show what the budgets are predicted to cost, and compress nothing
matrices = "all"  # matrices that share the budget: all, or mlp for those of the MLPs
keep = ""  # comma list of what stays as it is under --budget: embedding, heads, hidden
round_ranks: int | None = None  # ranks that a budget gives are multiples of it; default: 8 on CUDA (tensor cores), else 1
calibrate: str | None = None  # data set under data/: its training split is calibrated on, its validation split scored
calibration_tokens = 131072  # number of tokens to calibrate on
device = ""  # where to calibrate; default: CUDA if available, else Apple's mps, else the CPU

SHOWN = 20  # shapes that are printed
CURVE = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the parameters in the picture of several budgets
PICTURE = "checkpoints/plan.png"


def parse_shapes(dim_1, dim_2, n_factors, config):
    """The positional arguments as the shapes of the MLPs, which fit a KronyGPTConfig."""
    from model import mlp_shapes

    dim_1, dim_2, factors = int(dim_1), int(dim_2), [int(n) for n in n_factors.split(",")]
    shapes = mlp_shapes(dim_1, dim_2, factors * config.n_layer if len(factors) == 1 else factors)
    replace(config, shapes=shapes)  # which checks them
    a, b = dim_1 * dim_2, config.n_embd * config.n_inner[0] // (dim_1 * dim_2)
    if (most := max(factors)) > min(a, b):
        raise UserError(f"{most} factors of ({dim_1}, {dim_2}), where a sum of {min(a, b)} reaches every matrix")
    return shapes


def print_shapes(config, limit):
    """Print the shapes of the MLPs with which a model of a KronyGPTConfig has about `limit` parameters."""
    from kronygpt.budget import shapes_within

    if not (found := shapes_within(config, limit)):
        raise UserError(f"no shape of the MLPs makes a model of {limit:,} parameters: with --calibrate=DATASET the whole "
                        "model shares them")
    print(f"{'parameters':>12}  dim_1  dim_2  factors  multiply-adds of an MLP")
    for size, (dim_1, dim_2, r), macs in found[:SHOWN]:
        print(f"{size:>12,}  {dim_1:>5}  {dim_2:>5}  {r:>7}  {macs:>16.2f} × dense")
    if len(found) > SHOWN:
        print(f"... and {len(found) - SHOWN} more with as many multiply-adds or more")


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
    parts = ", ".join(f"{name} {sum(losses):.3g}" for name, losses in plan.losses.items())
    print("each rank counts once: r (m + n - r) numbers are in the file for a matrix [m, n] of rank r\n"
          f"predicted loss added (order only): {plan.loss:.3g} nats per token: {parts}")


def print_choice(names, plans, path, total):
    """Print what some budgets, {name: number of parameters}, are predicted to cost, and draw it with that of all `plans`,
    {number of parameters: Plan}. total: parameters of the dense model."""
    from matplotlib.ticker import EngFormatter

    from kronygpt.run_dir import new_figure, save_figure

    parts = list(next(iter(plans.values())).losses)
    print("predicted loss added (order only), nats per token\n" + "  ".join(
        f"{text:>11}" for text in ("budget", "of all", "in all", *parts)))
    for name, limit in names.items():
        losses = (plans[limit].loss, *(sum(plans[limit].losses[part]) for part in parts))
        print("  ".join((f"{name:>11}", f"{limit / total:>11.1%}", *(f"{loss:>11.3g}" for loss in losses))))
    figure = new_figure(8, 5)
    axes = figure.subplots()
    axes.plot(sorted(plans), [plans[limit].loss for limit in sorted(plans)], color="0.6")
    for name, limit in names.items():
        axes.plot(limit, plans[limit].loss, "C0o")
        axes.annotate(name, (limit, plans[limit].loss), (6, 6), textcoords="offset points")
    axes.set(xlabel="parameters", ylabel="predicted loss added (order only; nats per token)", yscale="log",
             title=str(init_from))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3, which="both")
    save_figure(figure, path)
    print(f"drawn in {path}")


def main(dim_1=None, dim_2=None, n_factors=None):
    from kronygpt import calibration, checkpoint, compress, data
    from kronygpt.budget import NARROWS, Plan, is_dense, parse_budget, plan_widths, room, smallest
    from kronygpt.device import pick_device
    from kronygpt.files import output_file
    from model import KINDS

    check_choice(globals(), "matrices", "all", "mlp")
    kept, texts = keep.split(",") if keep else [], budget.split(",")
    if unknown := set(kept) - set(NARROWS):
        raise UserError(f"--keep is a comma list of {', '.join(NARROWS)}, not {min(unknown)}")
    if dim_1 and (not n_factors or "budget" in configurator.given):
        raise UserError("give all three of dim_1 dim_2 n_factors, or a --budget without them")
    if out and len(texts) > 1:
        raise UserError("--out is for one budget; several go to checkpoints/best_....pt")

    dense, rest = checkpoint.load(init_from)
    config, options, start = dense.config, dict(init_from=init_from, init_options=rest["config"]), time.perf_counter()
    total = dense.count_parameters()["total"]
    if dim_1:
        name = f"{'calibrated' if calibrate else 'VL'}_{dim_1}_{dim_2}_{n_factors.replace(',', '-')}"
        names, plans = {name: 0}, {0: Plan("one shape for all MLPs", parse_shapes(dim_1, dim_2, n_factors, config))}
    elif not calibrate:
        return [print_shapes(config, parse_budget(text, total)) for text in texts]
    else:
        kinds = [kind for kind in KINDS if matrices == "all" or kind.startswith("mlp.")]
        is_whole = matrices == "all" and is_dense(dense)  # else ranks alone are chosen
        narrows = [part for part in NARROWS if is_whole and part not in kept]
        step = round_ranks or (8 if pick_device(device).type == "cuda" else 1)
        names = {f"best_{text}": parse_budget(text, total) for text in texts}
        for limit in names.values():
            room(config, kinds, limit, narrows, step)  # an error comes before the work
        options |= dict(budget=budget, matrices=matrices, keep=keep, round_ranks=step)
    paths, text = [output_file(out or f"checkpoints/{name}.pt") for name in names], None
    if calibrate:
        text = data.calibration_text(calibrate, calibration_tokens, config, device)
        held_out = data.load_tokens(calibrate, "val", config, config.block_size)
        dense.to(text.device)
        options |= dict(calibrate=calibrate, calibration_tokens=calibration_tokens)
    if not dim_1:
        limits, shown = list(names.values()), plan_only or len(names) > 1
        if shown:
            least = smallest(config, kinds, narrows, step)
            limits += [limit for share in CURVE if (limit := int(share * total)) >= least]
        plans = plan_widths(dense, limits, calibration.statistics(dense, text), narrows, kinds, step)
        plans = dict(zip(limits, plans))  # the statistics, which take gigabytes, are gone
        if shown:
            print_choice(dict(zip(texts, names.values())), plans, output_file(PICTURE), total)
            plans = {limit: plans[limit] for limit in names.values()}
    for path, limit in zip(paths, names.values()):
        if not dim_1:
            print_plan(plans[limit])
        if not plan_only:
            new, fits = compress.apply(dense, plans[limit], text)
            compress.report(dense, new, fits)
            if calibrate:
                compress.report_loss(dense, new, held_out, plans[limit])
            compress.write(path, dense, new, options, "config/train_gpt2.py" if dim_1 else "config/train_gpt2_budget.py")
    print(f"took {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(main)
