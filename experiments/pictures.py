"""Pictures of comparisons: the losses of several starts side by side."""
import re
import statistics

SAME_SIZE = 1.1  # starts whose numbers of parameters differ by less than this factor share a panel
MARKERS = "osD^vPX*hd"  # beside the ten colors of matplotlib's cycle, C0 to C9
ACCENT, GREY = "#c2410c", "0.5"  # of this project's method, and of all else
# method: in draw_added(), its label, the point that has it (the first one is before training), the offset from there in
# points, and its marker
LINES = {
    "Van Loan": ("Van Loan", -1, (9, -5), "s"),
    "Krony-PT's pruning": ("Krony-PT's pruning", -1, (9, -5), "P"),
    "hidden units pruned, refitted": ("hidden units pruned", -1, (9, -5), "D"),
    "SVD-LLM": ("SVD-LLM", 0, (-72, -4), "v"),
    "activation-aware SVD, even ranks": ("activation-aware SVD", -1, (9, -5), "^"),
    "ours": ("KronyGPT", -1, (9, -5), "o"),
}


def method(name):
    """The name of a start without the size in front of it: starts of one method at several sizes belong together."""
    return re.sub(r"^[\d.]+[KMB] ", "", name)


def method_styles(rows):
    """{method: color and marker}, in another combination for each ten."""
    return {name: dict(color=f"C{i % 10}", marker=MARKERS[(i + i // 10) % 10])
            for i, name in enumerate(dict.fromkeys(method(row["name"]) for row in rows))}


def dense_start(rows):
    """The start of a comparison with the shapes of its first row, the dense base: that model trained as long. Or None."""
    return next((row for row in rows[1:] if row["shapes"] == rows[0]["shapes"]), None)


def draw_pareto(rows, path, dataset):
    """Loss on a held-out text against parameters, before and after training, with a line for a method at several sizes, for
    rows {"name", "parameters", "shapes", "before"} of the dense base, and of the starts, which also have "runs", [{"after",
    "curve"}] with one for each seed."""
    from kronygpt.run_dir import new_figure, save_figure, use_log_scale

    figure, dense = new_figure(11, 5.5), dense_start(rows)
    left, right = figure.subplots(1, 2)
    for axes, title, loss in ((left, "before training", rows[0]["before"]), (right, "after training", loss_of_dense(rows))):
        axes.plot(rows[0]["parameters"] / 1e6, loss, "k*", markersize=14)
        axes.axhline(loss, color="k", linestyle=":", linewidth=1)
        axes.set(xlabel="parameters (millions)", ylabel=f"loss on held-out {dataset} (nats per token)", title=title)
        axes.grid(alpha=0.3)
        axes.margins(x=0.15)
    right.plot([], [], "k*:", markersize=14, label="dense (on the right: trained as long)" if dense else "dense")
    others = [row for row in rows[1:] if row is not dense]
    for name, style in method_styles(others).items():
        same = sorted((row for row in others if method(row["name"]) == name), key=lambda row: row["parameters"])
        x, losses = [row["parameters"] / 1e6 for row in same], [[r["after"] for r in row["runs"]] for row in same]
        left.plot(x, [row["before"] for row in same], markersize=7, **style)
        means, spread = zip(*((statistics.mean(ls), statistics.stdev(ls) if len(ls) > 1 else 0) for ls in losses))
        right.errorbar(x, means, spread if any(spread) else None, capsize=4, markersize=7, **style)
        right.plot([], [], label=name, markersize=7, **style)  # in the legend, without the error bar
    for axes in left, right:
        use_log_scale(axes)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    save_figure(figure, path)


def loss_of_dense(rows):
    """Loss of the dense model: trained as long, where such a start is there."""
    trained = dense_start(rows)
    return statistics.mean(r["after"] for r in trained["runs"]) if trained else rows[0]["before"]


def draw_added(rows, path):
    """Loss added over the dense model against the share of parameters kept, before and after training, for the methods in
    LINES; rows as in draw_pareto. Legible at 800 pixels and on a phone."""
    from kronygpt.run_dir import new_figure, save_figure

    figure, reference = new_figure(7.2, 5.4), loss_of_dense(rows)
    axes = figure.subplots()
    for name, (label, at, offset, marker) in LINES.items():
        same = sorted((row for row in rows[1:] if method(row["name"]) == name), key=lambda row: row["parameters"])
        if not same:
            continue
        color, width = (ACCENT, 2.5) if name == "ours" else (GREY, 1.5)
        x = [100 * row["parameters"] / rows[0]["parameters"] for row in same]
        before, after = ([loss - reference for loss in losses] for losses in (
            [row["before"] for row in same], [statistics.mean(r["after"] for r in row["runs"]) for row in same]))
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
    from kronygpt.run_dir import new_figure, save_figure

    figure, reference = new_figure(7.2, 3.8), loss_of_dense(rows)
    axes = figure.subplots()
    for i, row in enumerate(rows[1:]):
        color = ACCENT if row is rows[-1] else GREY
        before, after = row["before"] - reference, statistics.mean(r["after"] for r in row["runs"]) - reference
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


def group_by_size(rows):
    """Starts in groups of about the same number of parameters, smallest first."""
    groups = []
    for row in sorted(rows, key=lambda row: row["parameters"]):
        if groups and row["parameters"] < SAME_SIZE * groups[-1][0]["parameters"]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def mean_curve(row):
    """Steps and validation losses of a start, the means over seeds at the steps that all of them have."""
    curves = [dict(r["curve"]) for r in row["runs"]]
    steps = sorted(set.intersection(*map(set, curves)))
    return steps, [statistics.mean(curve[step] for curve in curves) for step in steps]


def draw_curves(rows, path):
    """Validation loss against steps, with a panel for each size. In each of them the reference is the dense model trained
    as long, and what it began with, on the same text; rows as of draw_pareto."""
    from kronygpt.run_dir import new_figure, save_figure, use_log_scale

    dense = dense_start(rows)
    others = [row for row in rows[1:] if row is not dense]
    groups, styles = group_by_size(others or rows[1:]), method_styles(others)
    figure = new_figure(1 + 6 * len(groups), 6)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, groups):
        if dense:
            steps, losses = mean_curve(dense)
            axes.axhline(losses[0], color="k", linestyle=":", label="dense, before training")
            axes.plot(steps, losses, "k*-", markersize=8, label="dense, trained as long")
        for row in group:
            if row is not dense:
                axes.plot(*mean_curve(row), markersize=4, label=row["name"], **styles[method(row["name"])])
        share = group[0]["parameters"] / rows[0]["parameters"]
        axes.set(xlabel="steps", title=f"{share:.0%} of the parameters")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    use_log_scale(panels[0])
    panels[0].set_ylabel("validation loss (nats per token)")
    save_figure(figure, path)
