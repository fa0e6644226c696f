"""Compare ways to compress one model: start, train, export and score each, then one table and two pictures.

    python -m experiments.compare config/compare_demo.py
    python -m experiments.compare config/compare_bytes.py --seeds=1,2,3 --steps=300

A start is a compressed checkpoint: its name and the command that makes it, one start for each line of --starts. Options
for its training follow a bar:

    Van Loan (256, 256, 1): kron_decompose.py 256 256 1
    even rows kept, distilled: prune.py | --teacher=gpt2
    a run that exists: out/mine

Each start is scored, trained by --train_config, once for each seed, and scored again; all starts see the same batches. The
work is done by the scripts that a person would run. With the first seed, the trained model is converted to a Hugging Face
model, and that model is scored. With --learning_rates=3e-5,1e-4,3e-4 the checkpoints are scored instead: whatever rate a
start has, the first seed tries one after the other until the loss rises, and the other seeds take the best one. Of a
directory that train.py made, the best checkpoint is scored, and nothing in it is changed; its loss before training is the
validation loss of its log at step 0.

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

from experiments import pictures
from kronygpt.configurator import UserError, check_range, run
from kronygpt.files import atomic_write, check_is_file
from kronygpt.run_dir import RunDir, read_log

base = "out/demo/base/best.pt"  # the dense model: a checkpoint, a Hugging Face directory or a hub name
starts = "Van Loan (256, 256, 1): kron_decompose.py 256 256 1"  # for each line, a name and a command or a run's directory
train_config = "config/demo_train.py"  # config file of train.py for every start
steps: int | None = None  # optimizer steps of each training; default: those of train_config
seeds = "1337"  # comma list of seeds for the batches; every start is trained once with each
learning_rates = ""  # comma list to try in turn until the loss rises, with the first seed; default: the start's own
dataset = "pydocs"  # data/<dataset>, for training and scores
out_dir = "out/demo"  # directory of the results

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("kron_decompose.py", "prune.py")
RESULT_FORMAT = 4  # of the kept results; those of another format are computed again
OUTPUTS = ("table.md", "results.json", "pareto.png", "loss.png")


def call(script, *args):
    """Run one of the scripts, show its output, and return the seconds that it took; UserError if it fails."""
    print(f"\n$ python {script} {shlex.join(args)}", flush=True)
    begin = time.perf_counter()
    if subprocess.run([sys.executable, str(ROOT / script), *args]).returncode:
        raise UserError(f"{script} failed; see above", status=1)
    return time.perf_counter() - begin


def parse_starts():
    """The option starts: [(name, [script, argument, ...] or [directory of a run], [option of train.py, ...])]."""
    parsed = {}  # by folder
    for line in filter(None, map(str.strip, starts.splitlines())):
        command, _, training = line.partition("|")
        name, _, command = command.rpartition(":")
        try:
            words, training = shlex.split(command), shlex.split(training)
        except ValueError as error:
            raise UserError(f"--starts: {error} in {line!r}") from None
        is_run = len(words) == 1 and not training and Path(words[0]).is_dir()
        if not (name and words and (is_run or words[0] in SCRIPTS)):
            raise UserError("--starts: a start is `name: kron_decompose.py ...`, `name: prune.py ...` or `name: RUN`, the "
                            f"directory of a run, not {line!r}")
        if is_run and not (best_of(words[0]).is_file() and RunDir(words[0]).log_path.is_file()):
            raise UserError(f"--starts: {words[0]} holds no run of train.py: no best.pt or ckpt.pt, or no log.jsonl")
        if is_run and Path(words[0]).resolve() in (Path(out_dir, part).resolve() for part in ("", folder_name(name))):
            raise UserError(f"--starts: results would be written into {words[0]}: give another name, or another --out_dir")
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
    from kronygpt import checkpoint

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
        {"after": loss in nats per token, "learning_rate", "seconds", "curve": [(step, validation loss)]}

    Raises:
        UserError: a script failed, or the training was stopped before its end.
    """
    from kronygpt import checkpoint

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
    return dict(after=after["loss"], learning_rate=last["config"]["learning_rate"], seconds=seconds,
                curve=validation_curve(folder / "log.jsonl"))


def validation_curve(log_path):
    """[(step, validation loss)] of a log.jsonl; UserError where one is not finite."""
    curve = [(entry["step"], entry["val_loss"]) for entry in read_log(log_path) if "val_loss" in entry]
    if not all(math.isfinite(loss) for _, loss in curve):
        raise UserError(f"a validation loss in {log_path} is not finite: use a lower learning rate", status=1)
    return curve


def best_of(run_path):
    """The best checkpoint of a run, or the latest one where a run is too young for it."""
    run_dir = RunDir(run_path)
    return run_dir.best if run_dir.best.is_file() else run_dir.last


def read_run(folder, run_path):
    """Score and describe a run that exists, as a row of the results; what its log does not tell is None."""
    after, curve = score(best_of(run_path), folder / "after.json"), validation_curve(RunDir(run_path).log_path)
    return dict(**describe(best_of(run_path)), before=dict(curve).get(0), tokens_per_second=after["tokens_per_second"],
                seconds=None, learning_rate=None, losses_by_rate={},
                runs=[dict(after=after["loss"], seconds=None, curve=curve)])


def mean_loss(row):
    """Mean over seeds of the loss after training, in nats per token."""
    return statistics.mean(r["after"] for r in row["runs"])


def gap_recovered(rows, row):
    """The share of the gap in loss, between the first start of the same shapes and the dense model, that a start closes:
    "before → after" training in percent, the latter relative to a dense start if there is one; "" for these two, and for a
    run that was not trained here."""
    dense, made = rows[0], [other for other in rows[1:] if other["seconds"] is not None]
    if row["seconds"] is None:
        return ""
    rival = next(other for other in made if other["shapes"] == row["shapes"])
    trained = next((other for other in made if other["shapes"] == dense["shapes"]), None)
    if rival is trained or rival["before"] in (row["before"], dense["before"]):  # with one start there is no gap
        return ""
    before = (rival["before"] - row["before"]) / (rival["before"] - dense["before"])
    if trained is None or mean_loss(rival) == mean_loss(trained):
        return f"{before:.0%}"
    after = (mean_loss(rival) - mean_loss(row)) / (mean_loss(rival) - mean_loss(trained))
    return f"{before:.0%} → {after:.0%}"


def cell(value, form):
    """A number of the table, and nothing for None."""
    return "" if value is None else format(value, form)


def table(rows):
    """The results as a Markdown table: losses in nats per token, ± the standard deviation over seeds."""
    rates = {row["learning_rate"] for row in rows[1:]} - {None}
    head = ["model", "parameters", "in MLPs", "loss before training", "loss after", "perplexity after", "gap recovered",
            *["learning rate"] * (len(rates) > 1), "start, s", "training, s", "tokens/s"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [row["name"], f"{row['parameters']:,}", f"{row['mlp_parameters'] / rows[0]['mlp_parameters']:.1%}",
                 cell(row["before"], ".3f")]
        if runs := row.get("runs"):
            losses, mean = [r["after"] for r in runs], mean_loss(row)
            spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            cells += [f"{mean:.3f}{spread}", f"{math.exp(mean):.3f}", gap_recovered(rows, row),
                      *[cell(row["learning_rate"], "g")] * (len(rates) > 1), cell(row["seconds"], ".0f"),
                      cell(statistics.median(r["seconds"] for r in runs), ".0f")]
        else:
            cells += [""] * (len(head) - 5)
        lines.append("| " + " | ".join([*cells, f"{row['tokens_per_second']:,.0f}"]) + " |")
    n_seeds = sorted({len(row["runs"]) for row in rows[1:]})
    caption = (f"Held-out text of {dataset}; {' or '.join(map(str, n_seeds))} seed{'s' * (n_seeds != [1])} each. Gap "
               "recovered: the share of the gap in loss, between the first start of the same shapes and the dense model, "
               "that a start closes; before → after training, for the latter with the dense model trained as long.")
    if tried := sorted({rate for row in rows[1:] for rate in row["losses_by_rate"]}):
        caption += (f" Learning rate: of {', '.join(f'{rate:g}' for rate in tried)}, the last before the loss rises, or the "
                    "last of all.")
    return "\n".join([*lines, "", caption, ""])


def write_results(rows):
    """Write results.json, table.md and the two pictures."""
    for name, text in (("results.json", json.dumps(rows, indent=2, allow_nan=False) + "\n"), ("table.md", table(rows))):
        with atomic_write(Path(out_dir, name), "w") as file:
            file.write(text)
    pictures.draw_pareto(rows[0], rows[1:], Path(out_dir, "pareto.png"), dataset)
    pictures.draw_curves(rows[0], rows[1:], Path(out_dir, "loss.png"))


def main():
    from kronygpt.data import find_dataset

    check_range(globals(), "steps", at_least=1, at_most=10**9)
    todo, numbers = parse_starts(), parse_numbers("seeds", int, -1, 2**63)
    rates = parse_numbers("learning_rates", float, 0, math.inf) if learning_rates else [None]  # None: its own
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
        is_exported = is_first and not learning_rates
        for name, command, training in todo:
            start_dir = folder / folder_name(name)
            if command[0] not in SCRIPTS:
                if is_first:
                    key = dict(settings, run=[command[0], modification_time(command[0])])
                    rows.append(dict(keep_result(start_dir / "run.json", key, read_run, start_dir, command[0]), name=name))
                continue
            made_in = folder / folder_name(next(n for n, c, _ in todo if c == command))  # the first one made in this way
            start = made_in / "start.pt"
            result = keep_result(made_in / "start.json", dict(settings, command=command), make_start, made_in, command)
            row = next((row for row in rows if row["name"] == name), None)
            if row is None:
                rows.append(row := dict(result, name=name, runs=[]))
            runs = {}  # by learning rate
            for rate in rates if is_first or not learning_rates else [row["learning_rate"]]:
                options = [*training, f"--learning_rate={rate}"] if rate else training
                run_dir = start_dir / (f"rate_{rate}_seed_{seed}" if rate else f"seed_{seed}")
                key = dict(training_settings, start=[str(start), modification_time(start)], training=options, seed=seed,
                           is_exported=is_exported)
                runs[rate] = keep_result(Path(f"{run_dir}.json"), key, train_start, run_dir, start, options, seed,
                                         is_exported)
                best = min(runs, key=lambda rate: runs[rate]["after"])
                if best != rate:
                    break
            if is_first:
                row |= dict(learning_rate=runs[best]["learning_rate"],
                            losses_by_rate={rate: run["after"] for rate, run in runs.items() if rate})
            row["runs"].append(runs[best])
        write_results(rows)
    print(f"\n{table(rows)}\nin {out_dir}/: table.md, results.json, pareto.png, loss.png")


if __name__ == "__main__":
    run(main)
