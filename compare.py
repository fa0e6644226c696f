"""Compare ways to compress one model: start, train, export and score each, then one table and two pictures.

    python compare.py config/compare_demo.py
    python compare.py config/compare_bytes.py --seeds=1,2,3 --steps=300

A start is a name and the command that makes its checkpoint, a line each in --starts; options for its training stand
behind a bar:

    Van Loan (256, 256, 1): kron_decompose.py 256 256 1
    even rows kept, distilled: prune.py | --teacher=gpt2

Each is scored as it stands, trained by --train_config with the same batches, once for each seed, and scored again, all by
the scripts that a person would run; with the first seed it is also converted to a Hugging Face model, which is what is
scored then. With --learning_rates=1e-4,3e-4 the first seed tries them all, and each start goes on with its own best one.
Results go to out_dir: results.json, table.md, pareto.png (loss against parameters) and loss.png (loss against steps),
written anew after each pass through the starts. What is done already is not done again, so that a comparison that was
stopped, or got another start, seed or learning rate, goes on where it was.
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

from configurator import UsageError, run
from files import replacing

base = "out/demo/base/best.pt"  # the dense model: a checkpoint, a Hugging Face directory or a hub name
starts = "Van Loan (256, 256, 1): kron_decompose.py 256 256 1"  # a line each: name: script and its arguments
train_config = "config/demo_train.py"  # how each start is trained
steps: int | None = None  # optimizer steps of each training; those of train_config if left out
seeds = "1337"  # of the batches, a comma list: every start is trained once with each
learning_rates = ""  # a comma list, of which each start takes its best with the first seed; train_config's if left out
dataset = "pydocs"  # what they are trained and scored on: data/<dataset>
out_dir = "out/demo"  # where everything goes

SAME_SIZE = 1.1  # starts whose MLPs differ by less than this factor share a panel of loss.png


class StepError(Exception):
    """One of the scripts failed; it has said why."""

    exit_status = 1


def call(script, *args):
    """Run one of the scripts, with its output shown; returns the seconds that it took."""
    print(f"\n$ python {script} {shlex.join(args)}", flush=True)
    begin = time.perf_counter()
    if subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *args]).returncode:
        raise StepError(f"{script} failed; see above")
    return time.perf_counter() - begin


def parse_starts():
    """[(name, [script, arguments ...], [options of train.py])] of the option."""
    parsed = {}  # by folder
    for line in filter(None, map(str.strip, starts.splitlines())):
        command, _, training = line.partition("|")
        name, _, command = command.rpartition(":")
        try:
            words, training = shlex.split(command), shlex.split(training)
        except ValueError as error:
            raise UsageError(f"--starts: {error} in {line!r}") from None
        if not (name and words and words[0] in ("kron_decompose.py", "prune.py")):
            raise UsageError(f"--starts: a start is `name: kron_decompose.py ...` or `name: prune.py ...`, not {line!r}")
        if folder_name(name) in parsed:
            raise UsageError(f"--starts: another start has the name {name!r}, or one like it")
        parsed[folder_name(name)] = name, words, training
    if not parsed:
        raise UsageError("--starts names no start")
    return list(parsed.values())


def folder_name(name):
    return re.sub(r"\W+", "_", name).strip("_")


def parse_seeds():
    try:
        return list(dict.fromkeys(int(seed) for seed in seeds.split(",")))
    except ValueError:
        raise UsageError(f"--seeds is a whole number or a comma list of them, not {seeds}") from None


def parse_rates():
    """The learning rates to try; [None] for that of train_config."""
    try:
        rates = list(dict.fromkeys(float(rate) for rate in learning_rates.split(","))) if learning_rates else [None]
    except ValueError:
        rates = [0]
    if not all(rate is None or rate > 0 for rate in rates):
        raise UsageError(f"--learning_rates is a number above 0 or a comma list of them, not {learning_rates}")
    return rates


def once(path, key, make, *args):
    """What make(*args) returns, kept in a JSON file: where it is there already, made from the same key, it is read."""
    try:
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            return kept["result"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # not made yet, or damaged
    path.parent.mkdir(parents=True, exist_ok=True)
    result = make(*args)
    with replacing(path, "w") as file:
        json.dump(dict(key=key, result=result), file, indent=2)
    return result


def age(source):
    """When a file or the newest one of a directory was written; 0 for a name on the hub."""
    path = Path(source)
    return max((p.stat().st_mtime for p in (path, *path.rglob("*")) if p.is_file()), default=0)


def score(source, path):
    """The result of perplexity.py for a model."""
    call("perplexity.py", str(source), dataset, f"--json_out={path}")
    return json.loads(path.read_text())[dataset]


def describe(source):
    """A model's parameters, in all and in its MLPs, and its shape."""
    import checkpoint

    model, _ = checkpoint.load(str(source))
    counts, config = model.count_parameters(), model.config
    return dict(parameters=counts["total"], mlp_parameters=counts["mlp"],
                shape=[config.dim_1, config.dim_2, *config.factors])


def score_base(path):
    result = score(base, path)
    return dict(**describe(base), before=result["loss"], tokens_per_second=result["tokens_per_second"])


def make_start(folder, command):
    """Make and score one start; returns what does not depend on the seed. Speed is that of the factored model, which the
    exported one, with its sums written out, does not have."""
    path = folder / "start.pt"
    seconds = call(*command, f"--init_from={base}", f"--out={path}")
    before = score(path, folder / "before.json")
    return dict(**describe(path), before=before["loss"], tokens_per_second=before["tokens_per_second"], seconds=seconds)


def train_start(folder, begin, training, seed, is_exported):
    """Train and score one start with one seed, in a folder of its own. Returns the loss, seconds and [(step, loss)]."""
    import checkpoint

    train_steps = [f"--max_iters={steps}"] if steps else []
    seconds = call("train.py", train_config, f"--init_from={begin}", f"--dataset={dataset}", f"--out_dir={folder}",
                   f"--seed={seed}", "--overwrite=True", *train_steps, *training)
    _, last = checkpoint.load(str(folder / "ckpt.pt"))
    if last["iter_num"] < last["config"]["max_iters"]:
        raise StepError(f"train.py was stopped after {last['iter_num']} of {last['config']['max_iters']} steps")
    source = folder / "best.pt"
    if is_exported:
        source = folder / "hf"
        call("kron_to_gpt.py", str(folder / "best.pt"), str(source))
    after = score(source, folder / "after.json")
    curve = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return dict(after=after["loss"], seconds=seconds,
                curve=[(entry["step"], entry["val_loss"]) for entry in curve if "val_loss" in entry])


def taken_back(rows, row):
    """The shares of the loss added by the first start of the same shape that another takes back, before and after
    training: over the dense base's, and over that of a dense start that was trained as long."""
    rival = next((other for other in rows[1:] if other["shape"] == row.get("shape")), row)
    trained = next((other for other in rows[1:] if other["mlp_parameters"] == rows[0]["mlp_parameters"]), None)
    if rival is row or rival is trained:
        return ""
    before = (rival["before"] - row["before"]) / (rival["before"] - rows[0]["before"])
    if trained is None:
        return f"{before:.0%}"
    losses = [statistics.mean(r["after"] for r in other["runs"]) for other in (trained, rival, row)]
    return f"{before:.0%} → {(losses[1] - losses[2]) / (losses[1] - losses[0]):.0%}"


def table(rows):
    """The results as a Markdown table; losses in nats per token, ± the standard deviation over seeds."""
    rates = sorted({rate for row in rows[1:] for rate in row["losses_by_rate"]})
    head = ["model", "parameters", "in MLPs", "loss before training", "loss after", "perplexity after", "taken back",
            *["learning rate"] * bool(rates), "start, s", "training, s", "tokens/s"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [row["name"], f"{row['parameters']:,}", f"{row['mlp_parameters'] / rows[0]['mlp_parameters']:.1%}",
                 f"{row['before']:.3f}"]
        if runs := row.get("runs"):
            losses = [r["after"] for r in runs]
            spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            cells += [f"{statistics.mean(losses):.3f}{spread}", f"{math.exp(statistics.mean(losses)):.3f}",
                      taken_back(rows, row), *([f"{row['learning_rate']:g}"] if rates else []), f"{row['seconds']:.0f}",
                      f"{statistics.median(r['seconds'] for r in runs):.0f}"]
        else:
            cells += [""] * (len(head) - 5)
        lines.append("| " + " | ".join([*cells, f"{row['tokens_per_second']:,.0f}"]) + " |")
    n_seeds = sorted({len(row["runs"]) for row in rows[1:]})
    tried = f" Learning rate: the best of {', '.join(f'{rate:g}' for rate in rates)} with the first seed." if rates else ""
    return "\n".join(lines) + (
        f"\n\nHeld-out text of {dataset}; {' or '.join(map(str, n_seeds))} seed{'s' * (n_seeds != [1])} each. Taken back: "
        "the share of the loss that the first start of the same shape adds to the dense model, before → after training "
        f"(there, to the dense model trained as long).{tried}\n")


def use_log_scale(axes):
    """A logarithmic axis of losses, with ticks that are plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [t for t in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)


def draw(rows):
    """pareto.png and loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dense, compressed = rows[0], rows[1:]
    markers = "osD^vPX*hd"
    styles = {row["name"]: dict(color=f"C{i % 10}", marker=markers[(i + i // 10) % 10], markersize=7)
              for i, row in enumerate(compressed)}

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axes, title in ((left, "before training"), (right, "after training")):
        axes.plot(dense["parameters"] / 1e6, dense["before"], "k*", markersize=14,
                  label=dense["name"] if axes is left else None)
        axes.set(xlabel="parameters (millions)", ylabel=f"loss on held-out {dataset} (nats per token)", title=title)
        axes.grid(alpha=0.3)
        axes.margins(x=0.15)
    for row in compressed:
        x, losses = row["parameters"] / 1e6, [r["after"] for r in row["runs"]]
        left.plot(x, row["before"], linestyle="", label=row["name"], **styles[row["name"]])
        right.errorbar(x, statistics.mean(losses), statistics.stdev(losses) if len(losses) > 1 else None, linestyle="",
                       capsize=4, **styles[row["name"]])
    use_log_scale(left)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(Path(out_dir, "pareto.png"), dpi=120)
    plt.close(figure)

    sizes = []  # of rows of about the same size
    for row in sorted(compressed, key=lambda row: row["mlp_parameters"]):
        if sizes and row["mlp_parameters"] < SAME_SIZE * sizes[-1][0]["mlp_parameters"]:
            sizes[-1].append(row)
        else:
            sizes.append([row])
    sizes = [group for group in sizes if group[0]["mlp_parameters"] < dense["mlp_parameters"]] or sizes
    figure, panels = plt.subplots(1, len(sizes), figsize=(1 + 6 * len(sizes), 6), layout="constrained", sharey=True,
                                  squeeze=False)
    for axes, group in zip(panels[0], sizes):
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
    figure.savefig(Path(out_dir, "loss.png"), dpi=120)
    plt.close(figure)


def main():
    todo, numbers, rates = parse_starts(), parse_seeds(), parse_rates()
    folder = Path(out_dir)
    settings = dict(base=[base, age(base)], dataset=[dataset, age(Path("data", dataset))])
    training_settings = dict(settings, config=Path(train_config).read_text(), steps=steps)
    rows = [dict(once(folder / "base.json", settings, score_base, folder / "base_score.json"), name="dense base")]
    for seed in numbers:
        for name, command, training in todo:
            place = folder / folder_name(name)
            result = once(place / "start.json", dict(settings, command=command), make_start, place, command)
            row = next((row for row in rows if row["name"] == name), None)
            if row is None:
                rows.append(row := dict(result, name=name, runs=[]))
            is_first, runs = seed == numbers[0], {}
            for rate in rates if is_first else [row["learning_rate"]]:
                options = [f"--learning_rate={rate}", *training] if rate else training
                where = place / (f"rate_{rate}_seed_{seed}" if rate else f"seed_{seed}")
                key = dict(training_settings, start=age(place / "start.pt"), training=options, seed=seed,
                           is_exported=is_first)
                runs[rate] = once(Path(f"{where}.json"), key, train_start, where, place / "start.pt", options, seed,
                                  is_first)
            best = min(runs, key=lambda rate: runs[rate]["after"])
            if is_first:
                row |= dict(learning_rate=best, losses_by_rate={rate: run["after"] for rate, run in runs.items() if rate})
            row["runs"].append(runs[best])
        for path, text in (("results.json", json.dumps(rows, indent=2) + "\n"), ("table.md", table(rows))):
            with replacing(folder / path, "w") as file:
                file.write(text)
        draw(rows)
    print(f"\n{table(rows)}\nin {out_dir}/: table.md, results.json, pareto.png, loss.png")


if __name__ == "__main__":
    run(main)
