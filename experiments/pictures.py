"""Pictures of comparisons: the losses of several starts side by side."""
import re
import statistics

SAME_SIZE = 1.1  # starts whose numbers of parameters differ by less than this factor share a panel
MARKERS = "osD^vPX*hd"  # beside the ten colors of matplotlib's cycle, C0 to C9


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
    loss_of_dense = statistics.mean(r["after"] for r in dense["runs"]) if dense else rows[0]["before"]
    for axes, title, loss in ((left, "before training", rows[0]["before"]), (right, "after training", loss_of_dense)):
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
