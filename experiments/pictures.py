"""Pictures of the losses of several starts side by side. matplotlib is imported when one is drawn."""
import math
import re
import statistics

from kronygpt.run_dir import new_figure, use_log_scale
from kronygpt.run_dir import save_figure as save

SAME_SIZE = 1.1  # starts whose MLPs differ by less than this factor share a panel
MARKERS = "osD^vPX*hd"
COLORS = 10  # of matplotlib's cycle, C0 to C9


def method(name):
    """The name of a start without the size in front of it: starts of one method at several sizes belong together."""
    return re.sub(r"^[\d.]+[KMB] ", "", name)


def method_styles(rows):
    """{method: color and marker}, in another combination for each ten."""
    return {name: dict(color=f"C{i % COLORS}", marker=MARKERS[(i + i // COLORS) % len(MARKERS)])
            for i, name in enumerate(dict.fromkeys(method(row["name"]) for row in rows))}


def draw_pareto(dense, rows, path, dataset):
    """Loss against parameters, before and after training, with a line for a method at several sizes.

    Args:
        dense: the row of the dense model: {"name", "parameters", "mlp_parameters", "before"}.
        rows: of the starts: the same, where "before" may be None, and "runs", [{"after", "curve"}] with one for each seed.
        path: of the picture.
        dataset: name of the held-out text.
    """
    figure = new_figure(11, 5.5)
    left, right = figure.subplots(1, 2)
    for axes, title in ((left, "before training"), (right, "after training")):
        axes.plot(dense["parameters"] / 1e6, dense["before"], "k*", markersize=14,
                  label=dense["name"] if axes is right else None)
        axes.set(xlabel="parameters (millions)", ylabel=f"loss on held-out {dataset} (nats per token)", title=title)
        axes.grid(alpha=0.3)
        axes.margins(x=0.15)
    for name, style in method_styles(rows).items():
        same = sorted((row for row in rows if method(row["name"]) == name), key=lambda row: row["parameters"])
        x, losses = [row["parameters"] / 1e6 for row in same], [[r["after"] for r in row["runs"]] for row in same]
        left.plot(x, [math.nan if row["before"] is None else row["before"] for row in same], markersize=7, **style)
        means, spread = zip(*((statistics.mean(ls), statistics.stdev(ls) if len(ls) > 1 else 0) for ls in losses))
        right.errorbar(x, means, spread if any(spread) else None, capsize=4, markersize=7, **style)
        right.plot([], [], label=name, markersize=7, **style)  # in the legend, without the error bar
    for axes in left, right:
        use_log_scale(axes)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    save(figure, path)


def group_by_size(dense, rows):
    """Starts in groups of about the same number of MLP parameters, smallest first; without the dense ones, if others are
    there."""
    groups = []
    for row in sorted(rows, key=lambda row: row["mlp_parameters"]):
        if groups and row["mlp_parameters"] < SAME_SIZE * groups[-1][0]["mlp_parameters"]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [group for group in groups if group[0]["mlp_parameters"] < dense["mlp_parameters"]] or groups


def draw_curves(dense, rows, path):
    """Validation loss against steps, the mean over seeds, with a panel for each size; arguments as of draw_pareto."""
    groups, styles = group_by_size(dense, rows), method_styles(rows)
    figure = new_figure(1 + 6 * len(groups), 6)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, groups):
        axes.axhline(dense["before"], color="k", linestyle=":", label=dense["name"])
        for row in group:
            curves = [dict(r["curve"]) for r in row["runs"]]
            common = sorted(set.intersection(*map(set, curves)))
            axes.plot(common, [statistics.mean(c[step] for c in curves) for step in common], markersize=4,
                      label=row["name"], **styles[method(row["name"])])
        share = group[0]["mlp_parameters"] / dense["mlp_parameters"]
        axes.set(xlabel="steps", title=f"{share:.0%} of the MLP parameters")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    use_log_scale(panels[0])
    panels[0].set_ylabel("validation loss (nats per token)")
    save(figure, path)
