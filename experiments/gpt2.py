"""GPT-2 compressed in several ways, scored on WikiText-103, WikiText-2 and LAMBADA: one table and one picture.

    make gpt2                                                   # before training
    python -m experiments.gpt2 --steps=2500                     # ... and after training each model: the work of a GPU
    python -m experiments.gpt2 --base=models/mine --dataset=pydocs --budgets=70%,50%,30%       # another model and text

It needs a network for GPT-2's weights, WikiText and LAMBADA (2 GB in the cache of Hugging Face). All compressions together
take minutes on a GPU and an hour on two CPU cores, with up to 9 GB of memory; scoring takes a minute a model on a GPU, and
half an hour on two cores. Finished work is not repeated. Results go to out_dir: table.md, gpt2.png, and the models in
checkpoints/.
"""
from functools import partial
from pathlib import Path

from experiments.compare import aligned, call, draw, keep_result, markdown, modification_time, score
from kronygpt import checkpoint
from kronygpt.configurator import run
from kronygpt.files import atomic_write, output_directory

base = "gpt2"  # the dense model: a hub name, a Hugging Face directory or a checkpoint
dataset = "wikitext"  # data/<dataset>, to calibrate and train on; default: made of WikiText-103's training split
documents = 200_000  # number of its rows that are streamed
budgets = "96M,82M,67M"  # comma list of budgets of this project's method
sets = "wiki103,wiki2,lambada"  # comma list of what perplexity.py scores
score_options = ""  # further options of perplexity.py, such as --wikitext=DIRECTORY
calibration_tokens = 131072  # number of tokens to calibrate on
steps = 0  # optimizer steps of a training after each compression; 0 for none
train_config = "config/train_gpt2_1b.py"  # config file of train.py for it
out_dir = "out/gpt2"  # directory of the results

PUBLISHED = {  # with Krony-PT (arXiv 2412.12351); the first of its rows joins two checkpoints, see docs/gpt2.md
    "GPT-2": ("124M", 29.16, 24.67, 45.28), "DistilGPT2": ("82M", 44.53, 36.48, 76.00),
    "Krony-PT": ("81M", 41.98, 34.99, 64.92), "Krony-PT, Van Loan": ("95M", 41.80, 35.50, 61.34)}


def methods(config):
    """[(command, {name of a model: name of the checkpoint that the command writes})] for a GPT-2 of a KronyGPTConfig."""
    C, parts = config.n_embd, budgets.split(",")
    text = f"--calibrate={Path('data', dataset).resolve()}", f"--calibration_tokens={calibration_tokens}"
    return [(["kron_decompose.py", str(C), str(C), "1"], {f"Van Loan ({C}, {C}, 1)": f"VL_{C}_{C}_1"}),
            (["prune.py"], {"Krony-PT's pruning": f"prune_{C // 2}_{4 * C}"}),
            *((["experiments/peers.py", "even_ranks", budget, *text],
               {f"activation-aware SVD, {budget}": f"even_ranks_{budget}"}) for budget in parts[1:] or parts),
            (["kron_decompose.py", f"--budget={budgets}", *text], {f"ours, {budget}": f"best_{budget}" for budget in parts})]


def scores(source, path):
    """{data set: perplexity} of a model."""
    return {name: score(source, name, path, *score_options.split())["perplexity"] for name in sets.split(",")}


def measure(source, folder):
    """Score a model, perhaps before and after training: {"parameters", "before": {data set: perplexity}, "after"}."""
    parameters, after = checkpoint.load(str(source), as_stored=True)[0].count_parameters()["total"], None
    before = scores(source, folder / "before.json")
    if steps:
        call("train.py", train_config, f"--init_from={source}", f"--dataset={dataset}", f"--out_dir={folder / 'run'}",
             f"--max_iters={steps}", "--overwrite=True")
        after = scores(folder / "run" / "best.pt", folder / "after.json")
    return dict(parameters=parameters, before=before, after=after)


def cells(rows):
    """Head and rows of the table of all models, {name: what measure() returns}, with the published figures of GPT-2's."""
    columns = [(when, name) for when in ("before", "after")[:2 if steps else 1] for name in sets.split(",")]
    found = [(name, f"{row['parameters'] / 1e6:.2f}M", *(f"{row[when][text]:.2f}" for when, text in columns))
             for name, row in rows.items()]
    if base == "gpt2" and sets == "wiki103,wiki2,lambada":
        empty = [""] * (len(columns) - 3)
        found += [(f"{name}, published", size, *empty, *map("{:.2f}".format, perplexities))
                  for name, (size, *perplexities) in PUBLISHED.items()]
    head = [text if when == "before" else f"{text}, trained" for when, text in columns]
    return ("model", "parameters", *head), found


def main():
    folder = output_directory(out_dir)
    if not Path("data", dataset, "train.bin").exists():
        call("prepare_owt.py", "--hub=Salesforce/wikitext", "--hub_config=wikitext-103-raw-v1", f"--documents={documents}",
             f"--out={dataset}")
    made_of = dict(base=[base, modification_time(base)], dataset=[dataset, modification_time(Path("data", dataset))])
    settings = dict(made_of, sets=sets, score_options=score_options, steps=steps,
                    train_config=Path(train_config).read_text(encoding="utf-8"))
    rows = {"dense": keep_result(folder / "dense.json", settings, measure, base, folder / "dense")}
    source = f"--init_from={Path(base).resolve() if Path(base).exists() else base}"
    for command, names in methods(checkpoint.load(base)[0].config):
        done = folder / "checkpoints" / f"{next(iter(names.values()))}.json"
        keep_result(done, dict(made_of, command=command), partial(call, *command, source, cwd=folder))
        for name, stem in names.items():
            model = folder / "checkpoints" / f"{stem}.pt"
            key = dict(settings, model=modification_time(model))
            rows[name] = keep_result(folder / f"{stem}.json", key, measure, model, folder / stem)
    with atomic_write(folder / "table.md", "w") as file:
        file.write(f"{markdown(*cells(rows))}\n\nPerplexities; lower is better.\n")
    first = sets.split(",")[0]
    draw([(name, row["parameters"], row["before"][first], row["after"] and row["after"][first])
          for name, row in rows.items()], folder / "gpt2.png", f"perplexity on {first}")
    print(f"\n{aligned(*cells(rows))}\nin {out_dir}/: table.md, gpt2.png\nPlease send us this table.")


if __name__ == "__main__":
    run(main)
