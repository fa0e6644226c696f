"""GPT-2 compressed in several ways, scored on WikiText-103, WikiText-2 and LAMBADA: one table and one picture.

    make gpt2                                                   # before training
    python -m experiments.gpt2 --steps=2500                     # ... and after training each model: the work of a GPU
    python -m experiments.gpt2 --base=models/mine --dataset=pydocs --budgets=70%,50%,30%       # another model and text

It needs a network for GPT-2's weights, WikiText and LAMBADA (2 GB in the cache of Hugging Face). Each compression takes
minutes on a GPU and half an hour on two CPU cores, with 6 GB of memory; scoring takes a minute a model on a GPU, and half
an hour on two cores. Finished work is not repeated. Results go to out_dir: table.md and gpt2.png.
"""
import json
import math
from pathlib import Path

from experiments.compare import aligned, call, keep_result, markdown, modification_time
from kronygpt import checkpoint
from kronygpt.configurator import run
from kronygpt.files import atomic_write, output_directory
from kronygpt.run_dir import new_figure, save_figure

base = "gpt2"  # the dense model: a hub name, a Hugging Face directory or a checkpoint
dataset = "wikitext"  # data/<dataset>, to calibrate and train on; default: made of WikiText-103's training split
documents = 200_000  # number of its rows that are streamed
budgets = "96M,82M,67M"  # comma list of budgets of this project's method
sets = "wiki103,wiki2,lambada"  # comma list of what perplexity.py scores
score_options = ""  # further options of perplexity.py, such as --wikitext=DIRECTORY
steps = 0  # optimizer steps of a training after each compression; 0 for none
train_config = "config/train_gpt2_1b.py"  # config file of train.py for it
out_dir = "out/gpt2"  # directory of the results

PUBLISHED = {  # with Krony-PT (arXiv 2412.12351); the first of its rows joins two checkpoints, see docs/gpt2.md
    "GPT-2": ("124M", 29.16, 24.67, 45.28), "DistilGPT2": ("82M", 44.53, 36.48, 76.00),
    "Krony-PT": ("81M", 41.98, 34.99, 64.92), "Krony-PT, Van Loan": ("95M", 41.80, 35.50, 61.34)}


def methods(config):
    """{name: command} of the compressions of a GPT-2 of a KronyGPTConfig."""
    C, first = config.n_embd, budgets.split(",")[0]
    text = f"--calibrate={dataset}"
    return {f"Van Loan ({C}, {C}, 1)": ["kron_decompose.py", str(C), str(C), "1"],
            "Krony-PT's pruning": ["prune.py"],
            **{f"activation-aware SVD, {budget}": ["experiments/peers.py", "even_ranks", budget, text]
               for budget in budgets.split(",")[1:] or [first]},
            **{f"ours, {budget}": ["kron_decompose.py", f"--budget={budget}", text] for budget in budgets.split(",")}}


def score(source, path):
    """{data set: perplexity} of a model."""
    perplexities = {}
    for name in sets.split(","):
        call("perplexity.py", str(source), name, f"--json_out={path}", *score_options.split())
        perplexities[name] = json.loads(path.read_text())[name]["perplexity"]
    return perplexities


def make(folder, command):
    """Make and score a model (the base has no command): {"parameters", "before": {data set: perplexity}, "after"}."""
    folder.mkdir(parents=True, exist_ok=True)
    source, after = base, None
    if command:
        source = folder / "start.pt"
        call(*command, f"--init_from={base}", f"--out={source}")
    parameters, before = checkpoint.load(str(source))[0].count_parameters()["total"], score(source, folder / "before.json")
    if steps:
        call("train.py", train_config, f"--init_from={source}", f"--dataset={dataset}", f"--out_dir={folder / 'run'}",
             f"--max_iters={steps}", "--overwrite=True")
        after = score(folder / "run" / "best.pt", folder / "after.json")
    return dict(parameters=parameters, before=before, after=after)


def table(rows):
    """The head and the rows of the results, followed by the published figures where GPT-2 was scored."""
    names = sets.split(",")
    times = ["before"] + ["after"] * bool(steps)
    cells = [(name, f"{row['parameters'] / 1e6:.2f}M", *(f"{row[when][s]:.2f}" for when in times for s in names))
             for name, row in rows.items()]
    if base == "gpt2":
        empty = [""] * (len(times) - 1) * len(names)
        cells += [(f"{name}, published", size, *empty, *(f"{p:.2f}" for p in perplexities))
                  for name, (size, *perplexities) in PUBLISHED.items()]
    head = [f"{s}{', trained' if when == 'after' else ''}" for when in times for s in names]
    return ("model", "parameters", *head), cells


def draw(rows, path):
    """Perplexity on the first data set against parameters: of this project's method, of others, and of the dense model."""
    first, when = sets.split(",")[0], "after" if steps else "before"
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for name, row in rows.items():
        x, y = row["parameters"] / 1e6, row[when][first]
        axes.plot(x, y, "o", color="C3" if name.startswith("ours") else "0.5")
        axes.annotate(name, (x, y), (6, 4), textcoords="offset points", fontsize="small")
    ours = [(row["parameters"] / 1e6, row[when][first]) for name, row in rows.items() if name.startswith("ours")]
    axes.plot(*zip(*sorted(ours)), color="C3")
    axes.axhline(rows["dense"][when][first], color="k", linestyle=":")
    axes.set(yscale="log", xlabel="parameters (millions)", ylabel=f"perplexity on {first}, lower is better",
             title=f"{Path(base).name}, {f'{steps:,} steps of training' if steps else 'compressed, before training'}")
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.15)
    save_figure(figure, path)


def main():
    folder = output_directory(out_dir)
    if not Path("data", dataset, "train.bin").exists():
        call("prepare_owt.py", "--hub=Salesforce/wikitext", "--hub_config=wikitext-103-raw-v1", f"--documents={documents}",
             f"--out={dataset}")
    settings = dict(base=[base, modification_time(base)], dataset=[dataset, modification_time(Path("data", dataset))],
                    sets=sets, score_options=score_options, steps=steps, train_config=train_config)
    rows = {}
    for name, command in {"dense": None, **methods(checkpoint.load(base)[0].config)}.items():
        place = folder / name.replace(" ", "_").replace("%", "")
        rows[name] = keep_result(place / "result.json", dict(settings, command=command), make, place, command)
    head, cells = table(rows)
    with atomic_write(folder / "table.md", "w") as file:
        file.write(f"{markdown(head, cells)}\n\nPerplexities; lower is better.\n")
    draw({name: row for name, row in rows.items() if all(map(math.isfinite, row["before"].values()))}, folder / "gpt2.png")
    print(f"\n{aligned(head, cells)}\nin {out_dir}/: table.md, gpt2.png\nPlease send us this table.")


if __name__ == "__main__":
    run(main)
