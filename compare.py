"""Compare ways to compress one model: start, train, export and score each, then one table and two pictures.

    python compare.py config/compare_demo.py
    python compare.py config/compare_bytes.py --seeds=1,2,3 --steps=300

A start is a compressed checkpoint: its name and the command that makes it, one start for each line of --starts. Options
for its training follow a bar:

    Van Loan (256, 256, 1): kron_decompose.py 256 256 1
    even rows kept, distilled: prune.py | --teacher=gpt2

Each start is scored, trained by --train_config, once for each seed, and scored again; all starts see the same batches. The
work is done by the scripts that a person would run. With the first seed, the trained model is converted to a Hugging Face
model, and that model is scored. With --learning_rates=3e-5,1e-4,3e-4 the first seed tries one rate after the other until the
loss rises, and the other seeds take the start's best one.

Results go to out_dir: results.json, table.md, pareto.png (loss against parameters) and loss.png (loss against steps), after
each pass through the starts. Finished work is not repeated: a comparison that was stopped, or that has another start, seed
or learning rate, continues where it was.
"""
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from configurator import UserError, check_range, run
from files import atomic_write, check_is_file

base = "out/demo/base/best.pt"  # the dense model: a checkpoint, a Hugging Face directory or a hub name
starts = "Van Loan (256, 256, 1): kron_decompose.py 256 256 1"  # one start for each line: name, script and arguments
train_config = "config/demo_train.py"  # config file of train.py for every start
steps: int | None = None  # optimizer steps of each training; default: those of train_config
seeds = "1337"  # comma list of seeds for the batches; every start is trained once with each
learning_rates = ""  # comma list to try in turn until the loss rises, with the first seed; default: that of train_config
dataset = "pydocs"  # data/<dataset>, for training and scores
out_dir = "out/demo"  # directory of the results

SAME_SIZE = 1.1  # starts whose MLPs differ by less than this factor share a panel of loss.png
RESULT_FORMAT = 2  # of the kept results; those of another format are computed again
OUTPUTS = ("table.md", "results.json", "pareto.png", "loss.png")
MARKERS = "osD^vPX*hd"  # in another order for each ten colors
LOSS_TICKS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)  # nats per token


def call(script, *args):
    """Run one of the scripts, show its output, and return the seconds that it took; UserError if it fails."""
    print(f"\n$ python {script} {shlex.join(args)}", flush=True)
    begin = time.perf_counter()
    if subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *args]).returncode:
        raise UserError(f"{script} failed; see above", status=1)
    return time.perf_counter() - begin


def parse_starts():
    """The option starts: [(name, [script, argument, ...], [option of train.py, ...])]."""
    parsed = {}  # by folder
    for line in filter(None, map(str.strip, starts.splitlines())):
        command, _, training = line.partition("|")
        name, _, command = command.rpartition(":")
        try:
            words, training = shlex.split(command), shlex.split(training)
        except ValueError as error:
            raise UserError(f"--starts: {error} in {line!r}") from None
        if not (name and words and words[0] in ("kron_decompose.py", "prune.py")):
            raise UserError(f"--starts: a start is `name: kron_decompose.py ...` or `name: prune.py ...`, not {line!r}")
        if folder_name(name) in parsed:
            raise UserError(f"--starts: another start has the name {name!r}, or one like it")
        parsed[folder_name(name)] = name, words, training
    if not parsed:
        raise UserError("--starts names no start")
    return list(parsed.values())


def folder_name(name):
    return re.sub(r"\W+", "_", name).strip("_")


def parse_numbers(name, kind, above, below):
    """The numbers of an option that is a comma list, each once."""
    try:
        numbers = list(dict.fromkeys(kind(number) for number in globals()[name].split(",")))
        if not all(above < number < below for number in numbers):
            raise ValueError
    except ValueError:
        raise UserError(f"--{name} is a comma list of {'whole ' * (kind is int)}numbers above {above} and below {below}, "
                        f"not {globals()[name]}") from None
    return numbers


def keep_result(path, key, compute, *args):
    """Read the result of compute(*args) from a JSON file with the same key, or compute it and write the file."""
    try:
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            return kept["result"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # no result yet, or a damaged one
    result = compute(*args)
    with atomic_write(path, "w") as file:
        json.dump(dict(key=key, result=result), file, indent=2, allow_nan=False)
    return result


def modification_time(source):
    """Time of the last change of a file, or of the newest file in a directory; 0 for a hub name."""
    path = Path(source)
    return max((p.stat().st_mtime for p in (path, *path.rglob("*")) if p.is_file()), default=0)


def score(source, path):
    """The result of perplexity.py for a model, which also goes to a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    call("perplexity.py", str(source), dataset, f"--json_out={path}")
    return json.loads(path.read_text())[dataset]


def describe(source):
    """Parameters of a model, in total and in its MLPs, and {matrix: [[dim_1, dim_2, factors] of each block]}."""
    import checkpoint

    model, _ = checkpoint.load(str(source))
    counts, shapes = model.count_parameters(), model.config.shapes
    return dict(parameters=counts["total"], mlp_parameters=counts["mlp"],
                shapes={name: [list(shape) for shape in shapes[name]] for name in shapes})


def make_start(folder, command):
    """Make (the base has no command), score and describe a start: what does not depend on the seed.

    tokens_per_second is that of the factored model: in the exported one the Kronecker products are expanded.
    """
    path = folder / "start.pt" if command else base
    seconds = call(*command, f"--init_from={base}", f"--out={path}") if command else 0
    before = score(path, folder / "before.json")
    return dict(**describe(path), before=before["loss"], tokens_per_second=before["tokens_per_second"], seconds=seconds)


def train_start(folder, start, options, seed, is_exported):
    """Train a start with one seed and score it, or if is_exported, the Hugging Face model made of it.

    Returns:
        {"after": loss in nats per token, "seconds", "curve": [(step, validation loss)]}

    Raises:
        UserError: a script failed, or the training was stopped before its end.
    """
    import checkpoint

    train_steps = [f"--max_iters={steps}"] if steps else []
    seconds = call("train.py", train_config, f"--init_from={start}", f"--dataset={dataset}", f"--out_dir={folder}",
                   f"--seed={seed}", "--overwrite=True", *train_steps, *options)
    _, last = checkpoint.load(str(folder / "ckpt.pt"))
    if last["iter_num"] < last["config"]["max_iters"]:
        raise UserError(f"train.py was stopped after {last['iter_num']} of {last['config']['max_iters']} steps", status=1)
    source = folder / "best.pt"
    if is_exported:
        source = folder / "hf"
        call("kron_to_gpt.py", str(folder / "best.pt"), str(source))
    after = score(source, folder / "after.json")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    curve = [(entry["step"], entry["val_loss"]) for entry in log if "val_loss" in entry]
    if not all(math.isfinite(loss) for _, loss in curve):
        raise UserError(f"a validation loss in {folder}/log.jsonl is not finite: use a lower learning rate", status=1)
    return dict(after=after["loss"], seconds=seconds, curve=curve)


def mean_loss(row):
    """Mean over seeds of the loss after training, in nats per token."""
    return statistics.mean(r["after"] for r in row["runs"])


def gap_recovered(rows, row):
    """The share of the gap in loss, between the first start of the same shapes and the dense model, that a start closes:
    "before → after" training in percent, the latter relative to a dense start if there is one; "" for these two."""
    dense = rows[0]
    rival = next(other for other in rows[1:] if other["shapes"] == row["shapes"])
    trained = next((other for other in rows[1:] if other["shapes"] == dense["shapes"]), None)
    if rival is row or rival is trained or rival["before"] == dense["before"]:
        return ""
    before = (rival["before"] - row["before"]) / (rival["before"] - dense["before"])
    if trained is None or mean_loss(rival) == mean_loss(trained):
        return f"{before:.0%}"
    after = (mean_loss(rival) - mean_loss(row)) / (mean_loss(rival) - mean_loss(trained))
    return f"{before:.0%} → {after:.0%}"


def table(rows):
    """The results as a Markdown table: losses in nats per token, ± the standard deviation over seeds."""
    rates = sorted({rate for row in rows[1:] for rate in row["losses_by_rate"]})
    head = ["model", "parameters", "in MLPs", "loss before training", "loss after", "perplexity after", "gap recovered",
            *["learning rate"] * bool(rates), "start, s", "training, s", "tokens/s"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [row["name"], f"{row['parameters']:,}", f"{row['mlp_parameters'] / rows[0]['mlp_parameters']:.1%}",
                 f"{row['before']:.3f}"]
        if runs := row.get("runs"):
            losses, mean = [r["after"] for r in runs], mean_loss(row)
            spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            cells += [f"{mean:.3f}{spread}", f"{math.exp(mean):.3f}", gap_recovered(rows, row),
                      *([f"{row['learning_rate']:g}"] if rates else []), f"{row['seconds']:.0f}",
                      f"{statistics.median(r['seconds'] for r in runs):.0f}"]
        else:
            cells += [""] * (len(head) - 5)
        lines.append("| " + " | ".join([*cells, f"{row['tokens_per_second']:,.0f}"]) + " |")
    n_seeds = sorted({len(row["runs"]) for row in rows[1:]})
    caption = (f"Held-out text of {dataset}; {' or '.join(map(str, n_seeds))} seed{'s' * (n_seeds != [1])} each. Gap "
               "recovered: the share of the gap in loss, between the first start of the same shapes and the dense model, "
               "that a start closes; before → after training, for the latter with the dense model trained as long.")
    if rates:
        caption += f" Learning rate: of {', '.join(f'{rate:g}' for rate in rates)}, the last before the loss rises."
    return "\n".join([*lines, "", caption, ""])


def use_log_scale(axes):
    """A logarithmic axis of losses, with plain numbers as ticks."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [t for t in LOSS_TICKS if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)


def save(figure, name):
    from matplotlib import pyplot as plt

    with atomic_write(Path(out_dir, name)) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def draw_pareto(rows, styles):
    """pareto.png: loss against parameters, before and after training."""
    from matplotlib import pyplot as plt

    dense = rows[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axes, title in ((left, "before training"), (right, "after training")):
        axes.plot(dense["parameters"] / 1e6, dense["before"], "k*", markersize=14,
                  label=dense["name"] if axes is left else None)
        axes.set(xlabel="parameters (millions)", ylabel=f"loss on held-out {dataset} (nats per token)", title=title)
        axes.grid(alpha=0.3)
        axes.margins(x=0.15)
    for row in rows[1:]:
        x, losses = row["parameters"] / 1e6, [r["after"] for r in row["runs"]]
        left.plot(x, row["before"], linestyle="", label=row["name"], **styles[row["name"]])
        right.errorbar(x, mean_loss(row), statistics.stdev(losses) if len(losses) > 1 else None, linestyle="", capsize=4,
                       **styles[row["name"]])
    use_log_scale(left)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    save(figure, "pareto.png")


def group_by_size(rows):
    """Starts in groups of about the same number of MLP parameters, smallest first; without the dense ones, if others are
    there."""
    groups = []
    for row in sorted(rows[1:], key=lambda row: row["mlp_parameters"]):
        if groups and row["mlp_parameters"] < SAME_SIZE * groups[-1][0]["mlp_parameters"]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [group for group in groups if group[0]["mlp_parameters"] < rows[0]["mlp_parameters"]] or groups


def draw_curves(rows, styles):
    """loss.png: validation loss against steps, the mean over seeds, with a panel for each size."""
    from matplotlib import pyplot as plt

    dense, groups = rows[0], group_by_size(rows)
    figure, panels = plt.subplots(1, len(groups), figsize=(1 + 6 * len(groups), 6), layout="constrained", sharey=True,
                                  squeeze=False)
    for axes, group in zip(panels[0], groups):
        axes.axhline(dense["before"], color="k", linestyle=":", label=dense["name"])
        for row in group:
            curves = [dict(r["curve"]) for r in row["runs"]]
            common = sorted(set.intersection(*map(set, curves)))
            axes.plot(common, [statistics.mean(c[step] for c in curves) for step in common],
                      **{**styles[row["name"]], "markersize": 4}, label=row["name"])
        share = group[0]["mlp_parameters"] / dense["mlp_parameters"]
        axes.set(xlabel="steps", title=f"{share:.0%} of the MLP parameters")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    use_log_scale(panels[0][0])
    panels[0][0].set_ylabel("validation loss (nats per token)")
    save(figure, "loss.png")


def write_results(rows):
    """Write results.json, table.md and the two pictures."""
    import matplotlib

    for name, text in (("results.json", json.dumps(rows, indent=2, allow_nan=False) + "\n"), ("table.md", table(rows))):
        with atomic_write(Path(out_dir, name), "w") as file:
            file.write(text)
    matplotlib.use("Agg")
    styles = {row["name"]: dict(color=f"C{i % 10}", marker=MARKERS[(i + i // 10) % len(MARKERS)], markersize=7)
              for i, row in enumerate(rows[1:])}
    draw_pareto(rows, styles)
    draw_curves(rows, styles)


def main():
    from data import find_dataset

    check_range(globals(), "steps", at_least=1, at_most=10**9)
    todo, numbers = parse_starts(), parse_numbers("seeds", int, -1, 2**63)
    rates = parse_numbers("learning_rates", float, 0, math.inf) if learning_rates else [None]  # None: that of train_config
    folder = Path(out_dir)
    for name in OUTPUTS:
        check_is_file(folder / name)
    if not Path(train_config).is_file():
        raise UserError(f"no config file --train_config={train_config}")
    find_dataset(dataset)
    settings = dict(format=RESULT_FORMAT, base=[base, modification_time(base)],
                    dataset=[dataset, modification_time(Path("data", dataset))])
    training_settings = dict(settings, config=Path(train_config).read_text(), steps=steps)
    rows = [dict(keep_result(folder / "base.json", settings, make_start, folder, None), name="dense base")]
    for seed in numbers:
        is_first = seed == numbers[0]
        for name, command, training in todo:
            start_dir = folder / folder_name(name)
            start = start_dir / "start.pt"
            result = keep_result(start_dir / "start.json", dict(settings, command=command), make_start, start_dir, command)
            row = next((row for row in rows if row["name"] == name), None)
            if row is None:
                rows.append(row := dict(result, name=name, runs=[]))
            runs = {}  # by learning rate
            for rate in rates if is_first else [row["learning_rate"]]:
                options = [f"--learning_rate={rate}", *training] if rate else training
                run_dir = start_dir / (f"rate_{rate}_seed_{seed}" if rate else f"seed_{seed}")
                key = dict(training_settings, start=modification_time(start), training=options, seed=seed,
                           is_exported=is_first)
                runs[rate] = keep_result(Path(f"{run_dir}.json"), key, train_start, run_dir, start, options, seed, is_first)
                best = min(runs, key=lambda rate: runs[rate]["after"])
                if best != rate:
                    break
            if is_first:
                row |= dict(learning_rate=best, losses_by_rate={rate: run["after"] for rate, run in runs.items() if rate})
            row["runs"].append(runs[best])
        write_results(rows)
    print(f"\n{table(rows)}\nin {out_dir}/: table.md, results.json, pareto.png, loss.png")


if __name__ == "__main__":
    run(main)
