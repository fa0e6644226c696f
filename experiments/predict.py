"""Check the prediction behind `kron_decompose.py --budget`: predicted against measured loss added, table and picture.

    python -m experiments.predict --init_from=models/mine --calibrate=pydocs        # → out/predict/table.md and predicted.png

Budgets from nearly all parameters to few of them are shared among all matrices, and each matrix is compressed alone to some
shares of its parameters. Each model is calibrated as kron_decompose.py does it, without training, and scored on
held-out text.
"""
from pathlib import Path

from experiments import pictures
from kronygpt.configurator import UserError, check_range, run
from kronygpt.files import atomic_write

init_from = "gpt2"  # the dense model: a hub name, a Hugging Face directory or a checkpoint
calibrate = "openwebtext"  # data set under data/: its training split is calibrated on, its validation split scored
calibration_tokens = 131072  # number of its tokens
eval_tokens = 131072  # number of tokens that are scored, at most
budgets = "0.95,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.25"  # comma list: shares of the model's parameters
shares = "0.5,0.25,0.1"  # comma list: shares of its parameters that a matrix keeps when it is compressed alone
device = ""  # cuda, cpu, ...; default: CUDA if available, else the CPU
out_dir = "out/predict"  # directory of the results

COLORS = {"attn.c_attn": "C0", "attn.c_proj": "C1", "mlp.c_fc": "C2", "mlp.c_proj": "C3"}


def parse_shares(name):
    """The numbers of an option that is a comma list of shares."""
    try:
        numbers = [float(text) for text in globals()[name].split(",")]
    except ValueError:
        numbers = [0.0]
    if not all(0 < number < 1 for number in numbers):
        raise UserError(f"--{name} is a comma list of numbers between 0 and 1, not {globals()[name]}")
    return numbers


def rank_correlation(pairs):
    """Spearman's rank correlation of [(x, y)]; no two x or y are expected to be equal."""
    import torch

    ranks = torch.tensor(pairs).argsort(0).argsort(0).double()
    return torch.corrcoef(ranks.T)[0, 1].item()


def draw(rows, path):
    """Predicted against measured loss added on logarithmic axes, with the line on which they are equal."""
    figure = pictures.new_figure(7, 6)
    axes = figure.subplots()
    for kind, color in COLORS.items():
        points = [(predicted, measured) for name, _, _, predicted, measured in rows if name.endswith(kind)]
        axes.plot(*zip(*points), "o", color=color, alpha=0.7, label=f"{kind}, alone")
    points = [(predicted, measured) for name, _, _, predicted, measured in rows if name == "budget"]
    axes.plot(*zip(*points), "k*-", markersize=10, label="all matrices, by budget")
    ends = [min(min(row[3:]) for row in rows if min(row[3:]) > 0), max(max(row[3:]) for row in rows)]
    axes.plot(ends, ends, "k:", label="predicted = measured")
    axes.set(xscale="log", yscale="log", xlabel="predicted loss added (nats per token)",
             ylabel=f"measured on held-out {calibrate} (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    pictures.save(figure, path)


def table(rows):
    """The results as a Markdown table, with the rank correlations."""
    lines = ["| compressed | parameters | of them | predicted | measured |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {name} | {size:,} | {share:.1%} | {predicted:.5f} | {measured:.5f} |"
              for name, size, share, predicted, measured in rows]
    alone, together = ([row[3:] for row in rows if (row[0] == "budget") == is_budget] for is_budget in (False, True))
    lines += ["", f"Loss added in nats per token. Rank correlation: {rank_correlation(alone):.3f} over {len(alone)} "
                  f"matrices alone, {rank_correlation(together):.3f} over {len(together)} budgets.", ""]
    return "\n".join(lines)


def main():
    import torch
    from tqdm import tqdm

    from kronygpt import calibration, checkpoint, data
    from kronygpt.budget import Plan, plan_ranks
    from kronygpt.compress import apply
    from kronygpt.data import load_tokens, windows
    from model import Shape

    check_range(globals(), "eval_tokens", at_least=1)
    budget_shares, matrix_shares = parse_shares("budgets"), parse_shares("shares")
    dense, _ = checkpoint.load(init_from)
    config = dense.config
    text = data.calibration_text(calibrate, calibration_tokens, config, device)
    tokens = load_tokens(calibrate, "val", config, config.block_size)
    starts = range(0, min(eval_tokens, len(tokens) - 1) - config.block_size + 1, config.block_size)
    held_out = windows(tokens, starts or [0], config.block_size, config.vocab_size, text.device)
    dense.to(text.device).eval()
    statistics = calibration.statistics(dense, text, [*config.matrices])

    @torch.no_grad()
    def loss(model):
        rows = calibration.batches(held_out[0])
        return sum(model(*(side[r] for side in held_out)).item() * len(held_out[0][r]) for r in rows) / len(held_out[0])

    def measured(plan):
        new, _ = apply(dense, plan, text)
        return new.count_parameters()["total"], loss(new) - base

    base, n_parameters, rows = loss(dense), dense.count_parameters()["total"], []
    print(f"dense: {n_parameters:,} parameters, loss {base:.4f} on {held_out[0].numel():,} tokens")
    bar = dict(unit="model", leave=False, disable=None)
    for share in tqdm(budget_shares, "budgets", **bar):
        plan = plan_ranks(config, [*config.matrices], int(share * n_parameters), statistics)
        total, added = measured(plan)
        rows.append(("budget", total, total / n_parameters, plan.loss, added))
    for name, sigma in tqdm(statistics.spectra.items(), "matrices", **bar):
        _, _, layer, kind = name.split(".", 3)
        m, n = config.matrices[kind]
        for share in matrix_shares:
            rank = max(1, int(share * m * n / (m + n)))
            shapes = [Shape(m, n, 1)] * config.n_layer
            shapes[int(layer)] = Shape(m, 1, rank)
            rows.append((f"block {layer} {kind}", rank * (m + n), rank * (m + n) / (m * n), sigma[rank:].sum().item() / 2,
                         measured(Plan("one matrix alone", {kind: shapes}, fisher=statistics.fisher))[1]))
    with atomic_write(Path(out_dir, "table.md"), "w") as file:
        file.write(table(rows))
    draw(rows, Path(out_dir, "predicted.png"))
    print(table(rows))
    print(f"wrote {out_dir}/table.md and predicted.png")


if __name__ == "__main__":
    run(main)
