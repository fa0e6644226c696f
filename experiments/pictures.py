"""The pictures of docs/report.md that are drawn from comparisons and spectra."""
import re

from experiments.compare import loss_of_dense, mean_loss
from kronygpt.run_dir import new_figure, save_figure

ACCENT, GREY = "#c2410c", "0.5"  # of this project's method, and of all else
# method: in draw_added(), its label, the point that has it (the first one is before training), the offset from there in
# points, and its marker
LINES = {
    "Van Loan": ("Van Loan", -1, (9, -5), "s"),
    "one row in four kept": ("one row in four kept", -1, (9, -5), "P"),
    "hidden units pruned, refitted": ("hidden units pruned", -1, (9, -5), "D"),
    "SVD-LLM": ("SVD-LLM", 0, (-72, -4), "v"),
    "activation-aware SVD, even ranks": ("activation-aware SVD", -1, (9, -5), "^"),
    "ours": ("KronyGPT", -1, (9, -5), "o"),
}


def method(name):
    """The name of a start without the size in front of it: starts of one method at several sizes belong together."""
    return re.sub(r"^[\d.]+[KMB] ", "", name)


def draw_added(rows, path):
    """Loss added over the dense model against the share of parameters kept, before and after training, for the methods in
    LINES; rows of experiments.compare. Legible at 800 pixels and on a phone."""
    figure, reference = new_figure(7.2, 5.4), loss_of_dense(rows)
    axes = figure.subplots()
    for name, (label, at, offset, marker) in LINES.items():
        same = sorted((row for row in rows[1:] if method(row["name"]) == name), key=lambda row: row["parameters"])
        if not same:
            continue
        color, width = (ACCENT, 2.5) if name == "ours" else (GREY, 1.5)
        x = [100 * row["parameters"] / rows[0]["parameters"] for row in same]
        before, after = [row["before"] - reference for row in same], [mean_loss(row) - reference for row in same]
        style = dict(marker=marker, color=color, linewidth=width, markersize=7)
        axes.plot(x, before, linestyle="--", markerfacecolor="white", **style)
        axes.plot(x, after, **style)
        axes.annotate(label, (x[at], (after if at else before)[at]), offset, textcoords="offset points", color=color,
                      fontsize=13, weight="bold" if name == "ours" else "normal")
    axes.plot([], [], "o--", color="k", markerfacecolor="white", label="before training")
    axes.plot([], [], "o-", color="k", label="after training")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.set_xlabel("parameters kept", fontsize=13)
    axes.set_ylabel("loss added over dense (nats per token)", fontsize=13)
    axes.tick_params(labelsize=13)
    axes.grid(alpha=0.3)
    axes.set_xlim(25, 90)
    figure.legend(fontsize=13, loc="outside upper center", ncols=2)
    save_figure(figure, path)


def draw_parts(rows, path):
    """Loss added over the dense model, before and after training, by what shares the budget: rows of an ablation, of which
    the last is the whole method."""
    figure, reference = new_figure(7.2, 3.8), loss_of_dense(rows)
    axes = figure.subplots()
    for i, row in enumerate(rows[1:]):
        color = ACCENT if row is rows[-1] else GREY
        before, after = row["before"] - reference, mean_loss(row) - reference
        axes.plot([after, before], [i, i], color=color, linewidth=2)
        axes.plot(before, i, "o", color=color, markerfacecolor="white", markersize=10, markeredgewidth=2)
        axes.plot(after, i, "o", color=color, markersize=10)
        for x, ha, dx in ((before, "left", 9), (after, "right", -9)):
            axes.annotate(f"{x:.3f}", (x, i), (dx, 0), textcoords="offset points", ha=ha, va="center", fontsize=12)
    axes.plot([], [], "o", color="k", markerfacecolor="white", label="before training")
    axes.plot([], [], "o", color="k", label="after training")
    axes.set_yticks(range(len(rows) - 1), [row["name"] for row in rows[1:]], fontsize=13)
    axes.set_xlabel("loss added over dense (nats per token)", fontsize=13)
    axes.tick_params(axis="x", labelsize=13)
    axes.set_xlim(0, 1.2 * (max(row["before"] for row in rows[1:]) - reference))
    axes.set_ylim(len(rows) - 1.5, -0.5)
    axes.grid(alpha=0.3, axis="x")
    figure.legend(fontsize=13, loc="outside upper center", ncols=2)
    save_figure(figure, path)


def draw_spectrum(spectra, path):
    """Singular values of rearranged matrices, trained and random, a panel for each shape."""
    figure = new_figure(11, 3.6)
    panels = figure.subplots(1, len(spectra), squeeze=False)
    for axes, ((dim_1, dim_2, r), (trained, random)) in zip(panels[0], spectra.items()):
        for sigma, color, label in ((trained, ACCENT, "trained"), (random, GREY, "random")):
            axes.plot(range(1, len(sigma) + 1), sigma, "o-", color=color, markersize=3, label=label)
        axes.axvline(r + 0.5, color="k", linestyle=":", label=f"r = {r}: kept to the left")
        highest = max(trained.max(), random.max()).item()
        axes.set(xlabel="product f", title=f"A is [{dim_1}, {dim_2}]", ylim=(0, 1.1 * highest))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0][0].set_ylabel("singular value over ‖W‖")
    save_figure(figure, path)
