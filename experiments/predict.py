"""Check the prediction behind `kron_decompose.py --budget`: predicted against measured loss added, table and picture.

    python -m experiments.predict --init_from=models/mine --calibrate=pydocs     # → out/predict/table.md, predicted.png

The whole model is compressed to each budget, and each matrix is also compressed alone. All models are calibrated as
kron_decompose.py does it, without training, and scored on held-out text. The table is written anew after each model.
"""
from pathlib import Path

import torch

from experiments.compare import markdown
from kronygpt import calibration, checkpoint, data
from kronygpt.budget import Plan, plan_widths
from kronygpt.compress import apply
from kronygpt.configurator import run
from kronygpt.files import atomic_write
from kronygpt.run_dir import new_figure, save_figure
from model import Shape

init_from = "gpt2"  # the dense model: a hub name, a Hugging Face directory or a checkpoint
calibrate = "openwebtext"  # data set under data/: its training split is calibrated on, its validation split scored
calibration_tokens = 131072  # number of its tokens
eval_tokens = 131072  # number of tokens that are scored, at most
budgets = "0.95,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.25"  # comma list: shares of the model's parameters
share = 0.25  # share of its parameters that a matrix keeps when it is compressed alone
device = ""  # cuda, mps, cpu, ...; default: CUDA if available, else Apple's mps, else the CPU
out_dir = "out/predict"  # directory of the results

BATCH_SIZE = 8  # windows that are scored together
COLORS = {"attn.c_attn": "C0", "attn.c_proj": "C1", "mlp.c_fc": "C2", "mlp.c_proj": "C3"}


def rank_correlation(pairs):
    """Spearman's rank correlation of [(x, y)]; no two x or y are expected to be equal."""
    ranks = torch.tensor(pairs).argsort(0).argsort(0).double()
    return torch.corrcoef(ranks.T)[0, 1].item()


def draw(rows, path):
    """Predicted against measured loss added on logarithmic axes, with the line on which they are equal."""
    figure = new_figure(7, 6)
    axes = figure.subplots()
    for end, style in [*((kind, dict(color=color, marker="o", alpha=0.7, linestyle="", label=f"{kind}, alone"))
                         for kind, color in COLORS.items()),
                       ("budget", dict(color="k", marker="*", markersize=10, label="whole model, by budget"))]:
        points = [row[3:] for row in rows if row[0].endswith(end)]
        axes.plot([x for x, _ in points], [y for _, y in points], **style)
    ends = [min(min(row[3:]) for row in rows if min(row[3:]) > 0), max(max(row[3:]) for row in rows)]
    axes.plot(ends, ends, "k:", label="predicted = measured")
    axes.set(xscale="log", yscale="log", xlabel="predicted loss added (nats per token)",
             ylabel=f"measured on held-out {calibrate} (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)


HEAD = "compressed", "parameters", "of them", "predicted", "measured"


def cells(name, size, share, predicted, measured):
    return name, f"{size:,}", f"{share:.1%}", f"{predicted:.5f}", f"{measured:.5f}"


def write_table(rows):
    """Write table.md: the results so far, and the rank correlation over single matrices."""
    table = markdown(HEAD, [cells(*row) for row in rows])
    alone = [losses for name, _, _, *losses in rows if name != "budget"]
    correlation = f"{rank_correlation(alone):.2f}" if len(alone) > 1 else "not known"
    with atomic_write(Path(out_dir, "table.md"), "w") as file:
        file.write(f"{table}\n\nLoss added in nats per token. Rank correlation of matrices alone: {correlation} over "
                   f"{len(alone)} matrices at {share:.0%}.\n")


def main():
    dense, _ = checkpoint.load(init_from)
    config, n_parameters = dense.config, dense.count_parameters()["total"]
    text = data.calibration_text(calibrate, calibration_tokens, config, device)
    tokens = data.load_tokens(calibrate, "val", config, config.block_size)[:eval_tokens]
    T = config.block_size
    held_out = data.sliding_windows(len(tokens) // T * T, T, T)
    dense.to(text.device)
    statistics = calibration.statistics(dense, text)

    def loss(model):
        return data.mean_loss(model.eval(), tokens, held_out, BATCH_SIZE)

    rows, base = [], loss(dense)

    def measure(name, plan, predicted, size=None, of=n_parameters):
        """Compress the model to a plan, score it, and write the table with the new row."""
        new, _ = apply(dense, plan, text)
        size = size or new.count_parameters()["total"]
        rows.append((name, size, size / of, predicted, loss(new) - base))
        print(*cells(*rows[-1]), sep="  ", flush=True)
        write_table(rows)

    print(f"dense: {n_parameters:,} parameters, loss {base:.4f} on {len(held_out)} windows", flush=True)
    print(*HEAD, sep="  ")
    limits = [int(float(part) * n_parameters) for part in budgets.split(",")]
    for plan in plan_widths(dense, limits, statistics):
        measure("budget", plan, plan.loss)
    for layer, kind, matrix in dense.matrices():
        m, n = matrix.weight.shape
        rank = max(1, int((m + n - ((m + n)**2 - 4 * share * m * n)**0.5) / 2))  # r (m + n - r) numbers are in a file
        shapes = [Shape(m, n, 1)] * config.n_layer
        shapes[layer] = Shape(m, 1, rank)
        plan = Plan("one matrix alone", {kind: shapes}, fisher=statistics.fisher)
        predicted = statistics.spectrum(f"transformer.h.{layer}.{kind}", matrix)[rank:].sum().item() / 2
        measure(f"block {layer} {kind}", plan, predicted, rank * (m + n - rank), m * n)
    draw(rows, Path(out_dir, "predicted.png"))
    print(f"wrote {out_dir}/table.md and predicted.png")


if __name__ == "__main__":
    run(main)
