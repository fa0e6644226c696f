"""Compare ways to compress one model: start, train, export and score each, then one table and one picture.

    python -m experiments.compare config/compare_demo.py
    python -m experiments.compare config/compare_demo.py --seeds=1,2,3 --steps=400

A start is a compressed checkpoint: its name and the command that makes it, one start for each line of --starts. Options
for its training follow a bar:

    Van Loan (256, 256, 1): kron_decompose.py 256 256 1
    even rows kept, distilled: prune.py | --teacher=gpt2 --learning_rate=3e-4
    SVD of all matrices: experiments/peers.py even_ranks 1.7M

Each start is scored, trained by --train_config, once for each seed, and scored again; all starts see the same batches. The
work is done by the scripts that you would run. With the first seed, the trained model is converted to a Hugging Face model,
and that model is scored.

Options that all starts share (the model, the data, the seed, the directories) are set here and win over those of a start.

Results go to out_dir: results.json, table.md and losses.png, after each pass through the starts. Finished work is not
repeated: a comparison that was stopped, or that has another start or seed, continues where it was.
"""
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from kronygpt import checkpoint
from kronygpt.configurator import UserError, run
from kronygpt.data import find_dataset
from kronygpt.files import atomic_write, output_directory
from kronygpt.run_dir import new_figure, save_figure, use_log_scale

base = "out/demo/base/best.pt"  # the dense model: a checkpoint, a Hugging Face directory or a hub name
starts = "Van Loan (256, 256, 1): kron_decompose.py 256 256 1"  # one start a line: name: command | options of its training
train_config = "config/demo_train.py"  # config file of train.py for every start
steps: int | None = None  # optimizer steps of each training; default: those of train_config
seeds = "1337"  # comma list of seeds for the batches; every start is trained once with each
dataset = "pydocs"  # data/<dataset>, for training and scores
n_batches: int | None = None  # score the first N batches of its held-out split; default: all of it
out_dir = "out/demo"  # directory of the results

MARKERS = "osD^vP<>Xp"
RESULT_FORMAT = 6  # of the kept results; those of another format are computed again


def call(script, *args, cwd=None):
    """Run a script of the repository, in a folder, and show its output; UserError if it fails."""
    words = ["-m", script.removesuffix(".py").replace("/", "."), *args]
    print(f"\n$ python {shlex.join(words)}" + (f"    # in {cwd}" if cwd else ""), flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # in another folder, too
    if subprocess.run([sys.executable, *words], cwd=cwd, env=environment).returncode:
        raise UserError(f"{script} failed; see above", status=1)


def parse_starts():
    """The option starts: {folder of a start: (name, [script, argument, ...], [option of train.py, ...])}."""
    parsed = {}
    for line in filter(None, map(str.strip, starts.splitlines())):
        start, _, training = line.partition("|")
        name, _, command = start.partition(":")
        folder = re.sub(r"\W+", "_", name).strip("_")
        if not command or folder in parsed:
            raise UserError(f"--starts: a start is `name: command` with a name of its own, not {line!r}")
        parsed[folder] = name, shlex.split(command), shlex.split(training)
    return parsed


def keep_result(path, key, compute, *args):
    """Read the result of compute(*args) from a JSON file with the same key, or compute it and write the file."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("key") == key:
        return kept["result"]
    result = compute(*args)
    with atomic_write(path, "w") as file:
        json.dump(dict(key=key, result=result), file, indent=2, allow_nan=False)
    return result


def modification_time(source):
    """Time of the last change of a file, or of the newest file in a directory; 0 for a hub name."""
    path = Path(source)
    return max((p.stat().st_mtime for p in (path, *path.rglob("*")) if p.is_file()), default=0)


def score(source, text, path, *options):
    """What perplexity.py says of a model on a text, and writes to a JSON file: {"loss": nats per token, "perplexity"}."""
    call("perplexity.py", str(source), text, f"--json_out={path}", *options)
    return json.loads(path.read_text())[text]


def loss_of(source, path):
    """The loss of a model on the held-out text in nats per token."""
    return score(source, dataset, path, *([str(n_batches)] if n_batches else []))["loss"]


def make_start(folder, command):
    """Make (the base has no command) and score a start: what does not depend on the seed.

    Returns:
        {"parameters", "shapes": {matrix: [[dim_1, dim_2, factors] of each block]}, "widths": {name: [width of each block]
        or bands of an embedding}, "before": loss}
    """
    path = folder / "start.pt" if command else base
    if command:
        call(*command, f"--init_from={base}", f"--out={path}")
    model, _ = checkpoint.load(str(path), as_stored=True)
    shapes = {name: [list(shape) for shape in of_blocks] for name, of_blocks in model.config.shapes.items()}
    widths = {name: getattr(model.config, name) for name in ("head_qk", "head_v", "n_inner", "wte", "wpe")}
    return dict(parameters=model.count_parameters()["total"], shapes=shapes, widths=widths,
                before=loss_of(path, folder / "before.json"))


def train_start(folder, start, options, seed, is_exported):
    """Train a start with one seed and score it, or if is_exported, the Hugging Face model made of it.

    Returns:
        {"after": loss, "learning_rate"}
    """
    train_steps = [f"--max_iters={steps}"] if steps else []
    call("train.py", train_config, *options, f"--init_from={start}", f"--dataset={dataset}", f"--out_dir={folder}",
         f"--seed={seed}", "--overwrite=True", *train_steps)  # ours last: they count
    _, last = checkpoint.load(str(folder / "ckpt.pt"), as_stored=True)
    source = folder / "best.pt"
    if is_exported:
        source = folder / "hf"
        call("kron_to_gpt.py", str(folder / "best.pt"), str(source))
    return dict(after=loss_of(source, folder / "after.json"), learning_rate=last["config"]["learning_rate"])


def mean_loss(row):
    """Mean over seeds of the loss after training, in nats per token."""
    return statistics.mean(r["after"] for r in row["runs"])


def spread(row):
    """mean_loss(row) ± the standard deviation over seeds, as text."""
    losses = [r["after"] for r in row["runs"]]
    return f"{mean_loss(row):.3f}" + (f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else "")


def seeds_of(rows):
    n = len(rows[1]["runs"])
    return f"{n} seed{'s' * (n > 1)}"


def dense_start(rows):
    """The start of a comparison with the shapes of its first row, the dense base: that model trained as long. Or None."""
    return next((row for row in rows[1:] if row["shapes"] == rows[0]["shapes"]), None)


def loss_of_dense(rows):
    """Loss of the dense model: trained as long, where such a start is there."""
    trained = dense_start(rows)
    return mean_loss(trained) if trained else rows[0]["before"]


def markdown(head, rows, n_left=1):
    """A Markdown table, its first columns to the left and the others to the right."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * n_left + "---:|" * (len(head) - n_left)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def aligned(head, rows):
    """The same for a terminal."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
                     for row in (head, *rows))


def draw(rows, path, what):
    """Draw losses or perplexities, `what`, against parameters: rows (name, parameters, before training, after or None), the
    dense model first."""
    figure = new_figure(8, 6)
    axes = figure.subplots()
    for i, (name, parameters, before, after) in enumerate(rows):
        x, values = parameters / 1e6, [before] if after is None else [before, after]
        color, marker = ("k", "*") if i == 0 else (f"C{(i - 1) % 10}", MARKERS[(i - 1) % 10])
        axes.plot([x] * len(values), values, color=color, linewidth=1)
        axes.plot(x, before, marker=marker, color=color, markerfacecolor="white", markersize=9)
        axes.plot(x, values[-1], marker=marker, color=color, markersize=9, linestyle="", label=name)
    axes.axhline(rows[0][2], color="k", linestyle=":", linewidth=1)
    is_trained = any(after is not None for *_, after in rows)
    axes.set(xlabel="parameters (millions)", ylabel=f"{what}, lower is better",
             title="hollow: before training" if is_trained else "before training")
    use_log_scale(axes)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    save_figure(figure, path)


def comparison_cells(rows):
    """Head and rows of a comparison's table: losses, ± standard deviation over seeds, and the rates where they differ."""
    n_columns = 4 + (len({row["learning_rate"] for row in rows[1:]}) > 1)
    cells = [(rows[0]["name"], f"{rows[0]['parameters']:,}", f"{rows[0]['before']:.3f}", "", "")]
    cells += [(row["name"], f"{row['parameters']:,}", f"{row['before']:.3f}", spread(row), f"{row['learning_rate']:g}")
              for row in rows[1:]]
    head = ("model", "parameters", "loss before training", "loss after", "learning rate")
    return head[:n_columns], [row[:n_columns] for row in cells]


def comparison_table(rows, unit="token"):
    return f"{markdown(*comparison_cells(rows))}\n\nLosses on held-out text in nats per {unit}; {seeds_of(rows)}."


def conclusion(rows):
    """One sentence: the best of the smaller models beside the dense one, trained as long where such a start is there."""
    smaller = [row for row in rows[1:] if row["parameters"] < rows[0]["parameters"]]
    if not smaller:
        return "No start is smaller than the dense model."
    best, gap = min(smaller, key=mean_loss), min(map(mean_loss, smaller)) - loss_of_dense(rows)
    return (f"The best smaller model, \"{best['name']}\", has {best['parameters'] / rows[0]['parameters']:.0%} of the "
            f"parameters of the dense model and ends at {mean_loss(best):.3f}, {abs(gap):.3f} nats "
            f"{'above' if gap > 0 else 'below'} the dense model{' trained as long' if dense_start(rows) else ''}.")


def main():
    todo, folder, numbers = parse_starts(), Path(out_dir), list(dict.fromkeys(int(seed) for seed in seeds.split(",")))
    output_directory(folder)
    find_dataset(dataset)
    settings = dict(format=RESULT_FORMAT, base=[base, modification_time(base)], n_batches=n_batches,
                    dataset=[dataset, modification_time(Path("data", dataset))])
    training_settings = dict(settings, config=Path(train_config).read_text(encoding="utf-8"), steps=steps)
    rows = [dict(keep_result(folder / "base.json", settings, make_start, folder, None), name="dense base")]
    rows += [dict(name=name, runs=[]) for name, _, _ in todo.values()]
    for seed in numbers:
        for i, (row, (place, (name, command, training))) in enumerate(zip(rows[1:], todo.items())):
            print(f"\nseed {seed}, start {i + 1} of {len(todo)}: {name}", flush=True)
            made_in = folder / next(p for p, (_, c, _) in todo.items() if c == command)  # the first one made in this way
            start, run_dir = made_in / "start.pt", folder / place / f"seed_{seed}"
            row |= keep_result(made_in / "start.json", dict(settings, command=command), make_start, made_in, command)
            key = dict(training_settings, start=[str(start), modification_time(start)], training=training, seed=seed,
                       is_exported=seed == numbers[0])
            row["runs"].append(keep_result(Path(f"{run_dir}.json"), key, train_start, run_dir, start, training, seed,
                                           seed == numbers[0]))
            row["learning_rate"] = row["runs"][0]["learning_rate"]
        text = f"{comparison_table(rows)} {conclusion(rows)}"
        for name, content in (("results.json", json.dumps(rows, indent=2, allow_nan=False)), ("table.md", text)):
            with atomic_write(folder / name, "w") as file:
                file.write(content + "\n")
        draw([(row["name"], row["parameters"], row["before"], mean_loss(row) if "runs" in row else None) for row in rows],
             folder / "losses.png", f"loss on held-out {dataset} (nats per token)")
    print(f"\n{aligned(*comparison_cells(rows))}\n\n{conclusion(rows)}\nin {out_dir}/: table.md, losses.png, results.json")


if __name__ == "__main__":
    run(main)
