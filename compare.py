"""Compare ways to compress one model: start, train, export and score each, then one table and two pictures.

    python compare.py config/compare_demo.py

A start is a name and the command that makes its checkpoint, a line each in --starts:

    Van Loan (256, 256, 1): kron_decompose.py 256 256 1
    even rows kept: prune.py

Each is scored as it stands, trained by --train_config with the same batches, converted to a Hugging Face model and
scored again, all by the scripts that a person would run. Results go to out_dir: results.json, table.md, pareto.png
(parameters against perplexity) and loss.png (loss against steps).
"""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from configurator import UsageError, run

base = "out/demo/base/best.pt"  # the dense model: a checkpoint, a Hugging Face directory or a hub name
starts = "Van Loan (256, 256, 1): kron_decompose.py 256 256 1"  # a line each: name: script and its arguments
train_config = "config/demo_train.py"  # how each start is trained
dataset = "pydocs"  # what they are trained and scored on: data/<dataset>
out_dir = "out/demo"  # where everything goes


class StepError(Exception):
    """One of the scripts failed; it has said why."""

    exit_status = 1


def call(script, *args):
    """Run one of the scripts, with its output shown."""
    print(f"\n$ python {script} {shlex.join(args)}", flush=True)
    if subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *args]).returncode:
        raise StepError(f"{script} failed; see above")


def parse_starts():
    """[(name, script, arguments)] of the option."""
    parsed = []
    for line in filter(None, map(str.strip, starts.splitlines())):
        name, _, command = line.rpartition(":")
        words = shlex.split(command)
        if not (name and words and words[0] in ("kron_decompose.py", "prune.py")):
            raise UsageError(f"--starts: a start is `name: kron_decompose.py ...` or `name: prune.py ...`, not {line!r}")
        parsed.append((name, words[0], words[1:]))
    return parsed


def score(source, path):
    """The result of perplexity.py for a model."""
    call("perplexity.py", str(source), dataset, f"--json_out={path}")
    return json.loads(path.read_text())[dataset]


def count(source):
    """Parameters of a model: in all and in its MLPs."""
    import checkpoint

    counts = checkpoint.load(str(source))[0].count_parameters()
    return dict(parameters=counts["total"], mlp_parameters=counts["mlp"])


def compare_start(name, script, args):
    """Make, score, train, export and score one start; returns its row. Speed is that of the factored model, which the
    exported one, with its sums written out, does not have."""
    folder = Path(out_dir, re.sub(r"\W+", "_", name).strip("_"))
    folder.mkdir(parents=True, exist_ok=True)
    call(script, *args, f"--init_from={base}", f"--out={folder / 'start.pt'}")
    before = score(folder / "start.pt", folder / "before.json")
    call("train.py", train_config, f"--init_from={folder / 'start.pt'}", f"--dataset={dataset}", f"--out_dir={folder}")
    call("kron_to_gpt.py", str(folder / "best.pt"), str(folder / "hf"))
    after = score(folder / "hf", folder / "after.json")
    curve = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return dict(name=name, **count(folder / "best.pt"), before=before["perplexity"], after=after["perplexity"],
                tokens_per_second=before["tokens_per_second"],
                curve=[(entry["step"], entry["val_loss"]) for entry in curve if "val_loss" in entry])


def table(rows):
    """The results as a Markdown table."""
    lines = ["| model | parameters | in MLPs | perplexity before training | after training | tokens/s |",
             "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        cells = [f"{row[key]:.3f}" if key in row else "" for key in ("before", "after")]
        lines.append(f"| {row['name']} | {row['parameters']:,} | {row['mlp_parameters']:,} | {' | '.join(cells)} | "
                     f"{row['tokens_per_second']:,.0f} |")
    return "\n".join(lines) + "\n"


def draw(rows):
    """pareto.png and loss.png."""
    import math

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    dense, compressed = rows[0], rows[1:]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.axhline(dense["after"], color="0.6", linestyle=":", zorder=0)
    axes.plot(dense["parameters"] / 1e6, dense["after"], "k*", markersize=14, label=dense["name"])
    for row in compressed:
        x = row["parameters"] / 1e6
        line, = axes.plot(x, row["after"], "o", markersize=9, label=row["name"])
        axes.plot(x, row["before"], "o", markersize=9, markerfacecolor="none", color=line.get_color())
        axes.annotate("", (x, row["after"]), (x, row["before"]),
                      arrowprops=dict(arrowstyle="->", color=line.get_color(), shrinkA=6, shrinkB=6))
    axes.set(yscale="log", xlabel="parameters (millions)", ylabel=f"perplexity on held-out {dataset}",
             title="Parameters against perplexity: before (open) and after training")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter(StrMethodFormatter("{x:g}"))
    axes.margins(x=0.15)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(Path(out_dir, "pareto.png"), dpi=120)

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.axhline(math.log(dense["after"]), color="k", linestyle=":", label=dense["name"])
    for row in compressed:
        axes.plot(*zip(*row["curve"]), "o-", markersize=4, label=row["name"])
    axes.set(xlabel="steps", ylabel="validation loss (nats per token)", title="Validation loss in training")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(out_dir, "loss.png"), dpi=120)


def main():
    todo = parse_starts()
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    dense = score(base, Path(out_dir, "base.json"))
    rows = [dict(name="dense base", **count(base), after=dense["perplexity"],
                 tokens_per_second=dense["tokens_per_second"])]
    rows += [compare_start(*start) for start in todo]
    Path(out_dir, "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    Path(out_dir, "table.md").write_text(table(rows))
    draw(rows)
    print(f"\n{table(rows)}\nin {out_dir}/: table.md, results.json, pareto.png, loss.png")


if __name__ == "__main__":
    run(main)
