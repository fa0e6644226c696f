"""Make every picture and table of docs/report.md and docs/learning_rates.md, and the tables of README.md, from runs.

    python -m experiments.figures                      # the runs that are missing, then all pictures and tables
    python -m experiments.figures compare_base         # ... and this run of the list below, again
    python -m experiments.figures --only=plan          # one picture or table, without runs

Runs are the commands that you would give, one after the other. A run whose output is there is not repeated. Pictures go to
docs/*.png. A table stands in the documents between `<!-- table: NAME -->` and `<!-- end -->`, and is replaced as a whole.
Where a run is missing, its tables and pictures stay as they are. docs/runs.json keeps the commit, the machine and the
minutes of each run.
"""
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import torch

from experiments.compare import comparison_table, dense_start, markdown, mean_loss, seeds_of, spread
from experiments.pictures import draw_added, draw_parts, draw_spectrum, method
from kronygpt import calibration, checkpoint, compress, data
from kronygpt.configurator import UserError, run
from kronygpt.files import atomic_write
from kronygpt.kron import rearrange
from model import KINDS, KronyGPT, KronyGPTConfig, Shape, contraction_order, mlp_shapes, multiply_adds

only = ""  # name of one picture or table to make; default: all of them

DOCUMENTS = "docs/report.md", "docs/learning_rates.md", "README.md"  # the files with tables
ROOT = Path(__file__).resolve().parent.parent
DEMO_DATASET, CALIBRATION_TOKENS = "pydocs", 131072  # behind the table of errors
BYTES_BASE = "../shared/data/gpt2-bytes"  # as in config/compare_bytes.py; the only base that no command makes
# In this order: the first ones make what the others read. `feeds`: the tables and pictures that a run makes. `reads`: what
# no run makes; without it, the run is left out.
Run = namedtuple("Run", "command output feeds reads", defaults=(None,))
RUNS = {
    "pydocs": Run("-m experiments.prepare_pydocs", "data/pydocs/meta.json", "text of the demo and of bytes"),
    "demo_base": Run("train.py config/demo_base.py", "out/demo/base/best.pt", "report: singular values, errors of the fits"),
    "demo": Run("-m experiments.compare config/compare_demo.py", "out/demo/results.json", "appendix: the demo's table"),
    "pysource": Run("-m experiments.prepare_pysource", "data/pysource/meta.json", "text of the base"),
    "base": Run("train.py config/base.py --dtype=bfloat16", "out/base/best.pt", "report: the base"),
    "compare_base": Run("-m experiments.compare config/compare_base.py", "out/compare_base/results.json",
                        "README and report: results, what a budget chose"),
    "compare_ablation": Run("-m experiments.compare config/compare_ablation.py", "out/compare_ablation/results.json",
                            "report: what each part is worth"),
    "compare_kronecker": Run("-m experiments.compare config/compare_kronecker.py", "out/compare_kronecker/results.json",
                             "report: Kronecker products against low rank"),
    "predict": Run("-m experiments.predict --init_from=out/base/best.pt --calibrate=pysource --budgets=0.66,0.5,0.3 "
                   "--calibration_tokens=16384 --eval_tokens=16384 --out_dir=out/predict_base",
                   "out/predict_base/table.md", "report: predicted and measured loss"),
    "compare_bytes": Run("-m experiments.compare config/compare_bytes.py", "out/compare_bytes/results.json",
                         "appendix: results over bytes", BYTES_BASE),
    "bench": Run("-m experiments.bench --repeats=3 --shapes='768,768,1 768,1,288,288'", "out/bench/results.json",
                 "report: speed at GPT-2's sizes"),
}
RECORDS = Path("docs/runs.json")
MADE_HERE = (":!*.md", ":!docs/*.png", f":!{RECORDS}")  # as git's patterns
TABLE = re.compile(r"<!-- table: (\w+) -->(?:(?!<!-- table).)*?<!-- end -->", re.DOTALL)
HEADLINE_SIZE = "4.5M"  # of the starts in the README's table
PLAN_SIZE = "3.5M"  # of the start whose widths and ranks are shown
GPT2_SHAPES = [(768, 3072, 1), (768, 1536, 1), (384, 3072, 1), (768, 768, 1), (768, 1, 160), (256, 64, 36), (128, 32, 100),
               (32, 64, 4)]  # of c_fc
GPT2_RANK = 288  # of all matrices of GPT-2 with 82M parameters in all
OURS = "KronyGPT"  # what tables call the method that configs call "ours"
NOT_KNOWN = "—"
BATCH_SIZE = 8  # windows that are scored together


# ---- documents and runs

def rewrite(text, tables):
    """A document with new tables between its markers; tables: {name: Markdown, or None to leave the table as it is}."""
    def replacement(match):
        table = tables[match[1]]
        return match[0] if table is None else f"<!-- table: {match[1]} -->\n\n{table.strip()}\n\n<!-- end -->"

    return TABLE.sub(replacement, text)


def rewrite_documents(paths, tables):
    """Rewrite the tables of some files. UserError, before anything is written, where a table or its place is missing."""
    texts = {path: Path(path).read_text(encoding="utf-8") for path in paths}
    places = {match[1] for text in texts.values() for match in TABLE.finditer(text)}
    if odd := places ^ tables.keys():
        raise UserError(f"the tables {sorted(odd)} are not both in experiments/figures.py and, with a marker and an end, in "
                        f"{' or '.join(paths)}")
    for path, text in texts.items():
        if (new := rewrite(text, tables)) != text:
            with atomic_write(path, "w") as file:
                file.write(new)


def make(name):
    """Make a run of the list, and record the commit, the machine and the minutes that it took."""
    command, begin = RUNS[name].command, time.perf_counter()
    print(f"\n$ python {command}", flush=True)
    if subprocess.run([sys.executable, *shlex.split(command)]).returncode:
        raise UserError(f"the run {name} failed; see above", status=1)
    records = read_records()
    records[name] = dict(commit=commit(), machine=machine(), minutes=round((time.perf_counter() - begin) / 60, 1))
    with atomic_write(RECORDS, "w") as file:
        file.write(json.dumps({n: records[n] for n in RUNS if n in records}, indent=2, ensure_ascii=False) + "\n")


def read_records():
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}


def commit():
    """The abbreviated commit of the working tree, with a + where tracked files, other than what is made here, differ."""
    def git(*args):
        return subprocess.run(["git", *args], capture_output=True, text=True)

    head = git("rev-parse", "--short", "HEAD").stdout.strip()
    return head + "+" * bool(git("diff", "--quiet", "HEAD", "--", ".", *MADE_HERE).returncode) if head else NOT_KNOWN


def machine():
    """The processor and the number of cores, and the GPU if there is one."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else None
    cpu = f"{os.cpu_count()} cores, {model[1] if model else platform.processor()}"
    return f"{cpu}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cpu


def read(name):
    """What a run has made: a KronyGPT, the content of a results.json, or the text of a table; None if it is not there."""
    path = Path(RUNS[name].output)
    if not path.exists():
        return None
    if path.suffix == ".pt":
        return checkpoint.load(str(path))[0]
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else text


# ---- tables

def empty_model(config):
    """A KronyGPT without weights, which has the shapes of all parameters."""
    with torch.device("meta"):
        return KronyGPT(config)


def parameters_table(config):
    """The parameters of each part of a model, the largest part first."""
    names = {"transformer.wte.weight": "token embedding = output matrix", "transformer.wpe.weight": "position embedding"}
    parts = dict.fromkeys((*KINDS, *names.values(), "biases and layer norms"), 0)
    for name, p in empty_model(config).named_parameters():
        kind = name.split(".", 3)[-1].removesuffix(".A")
        parts[names.get(name, kind if kind in parts else "biases and layer norms")] += p.numel()
    total = sum(parts.values())
    rows = [*sorted(parts.items(), key=lambda part: -part[1]), ("in all", total)]
    return markdown(["part", "parameters", "share"], [(name, f"{n:,}", f"{n / total:.1%}") for name, n in rows])


def shapes_table(m, n, shapes):
    """What shapes (dim_1, dim_2, r) of a matrix [m, n] cost: parameters, rank, and multiply-adds per token over dense."""
    rows = []
    for dim_1, dim_2, r in shapes:
        is_dense, is_low_rank = (dim_1, dim_2, r) == (m, n, 1), (dim_1, dim_2) == (m, 1)
        A, B = (r, dim_1, dim_2), (r, m // dim_1, n // dim_2)
        size = math.prod(A) + math.prod(B) * (not is_dense) - r**2 * is_low_rank  # a rank is stored once
        rank = min(m, n, r * min(dim_1, dim_2) * min(m // dim_1, n // dim_2))
        macs = multiply_adds(A, B)
        cells = [f"{macs[order] / (m * n):.2f}" for order in "ABW"]
        cells = ["", "", "1.00", ""] if is_dense else [*cells, contraction_order(A, B, 1024)]
        rows.append((f"({dim_1}, {dim_2}, {r})", f"{size:,}", f"{size / (m * n):.1%}", rank, *cells))
    return markdown(["shape", "parameters", "of dense", "rank, at most", "A first", "B first", "W built",
                     "chosen for 1,024 tokens"], rows)


def gpt2_models():
    """{name: KronyGPTConfig} of the table of a step."""
    gpt2 = KronyGPTConfig()
    low_rank = {kind: [Shape(m, 1, GPT2_RANK)] * gpt2.n_layer for kind, (m, _) in gpt2.sizes(0).items()}
    return {"dense": gpt2, "MLPs (768, 768, 1)": KronyGPTConfig(shapes=mlp_shapes(768, 768, [1] * gpt2.n_layer)),
            f"all matrices of rank {GPT2_RANK}": KronyGPTConfig(shapes=low_rank)}


def step_table(configs):
    """Multiply-adds per token of a forward pass on full blocks, by part, of {name: KronyGPTConfig}."""
    rows = []
    for name, config in configs.items():
        model = empty_model(config)
        parts = {"attn": 0, "mlp": 0}
        for _, kind, matrix in model.matrices():
            parts[kind.partition(".")[0]] += min(multiply_adds(matrix.A.shape, matrix.B.shape).values())
        numbers = *parts.values(), 2 * config.n_layer * config.n_embd * config.block_size, config.vocab_size * config.n_embd
        rows.append((name, *(f"{number / 1e6:.1f}" for number in (*numbers, sum(numbers)))))
    return markdown(["million multiply-adds per token", "attention matrices", "MLP matrices", "scores and values",
                     "output matrix", "in all"], rows)


def quarter_shapes(config):
    """Shapes of c_fc with a quarter of its parameters: Krony-PT's, smaller factors, and low rank."""
    C, hidden = config.n_embd, config.n_inner[0]
    size = C * C + hidden // C
    pairs = (C, C), (C // 2, C // 8), (C, 1)
    return [(d1, d2, max(1, size // (d1 * d2 + C * hidden // (d1 * d2)))) for d1, d2 in pairs]


def mean_spectra(matrices, shapes):
    """{(dim_1, dim_2, r): (spectrum of trained matrices, of random ones)}: means over matrices of the singular values of the
    rearranged W over its norm, in descending order."""
    def spectrum(W, dim_1, dim_2):
        sigma = torch.linalg.svdvals(rearrange(W.double().contiguous(), dim_1, dim_2))
        return sigma / sigma.norm()

    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(W.shape, generator=generator) for W in matrices]
    return {shape: [torch.stack([spectrum(W, *shape[:2]) for W in group]).mean(0) for group in (matrices, random)]
            for shape in shapes}


def spectra_of(dense):
    """mean_spectra() of the MLPs as [C, n_inner]: c_fc, and c_proj transposed, whose shapes are the mirror images."""
    matrices = [W.detach() for block in dense.transformer.h for W in (block.mlp.c_fc.weight, block.mlp.c_proj.weight.T)]
    return mean_spectra(matrices, quarter_shapes(dense.config))


def spectrum_table(spectra):
    """The share of ‖W‖² that the best r products keep."""
    def kept(sigma, r):
        return f"{sigma[:r].square().sum():.1%}"

    return markdown(["shape", "products that exist", "kept, trained", "kept, random"],
                    [(shape, len(trained), kept(trained, shape[2]), kept(random, shape[2]))
                     for shape, (trained, random) in spectra.items()])


def errors_table(dense, text, tokens, held_out, shapes):
    """Errors of weights and outputs, and losses, of Van Loan's sums and of the same shapes fitted to text, both with the
    hidden units in the order of calibration. tokens and held_out as in data.score."""
    def loss(model):
        return f"{data.mean_loss(model.eval(), tokens, held_out, BATCH_SIZE):.3f}"

    config = dense.config
    rows = [("dense", "", "", loss(dense))]
    for dim_1, dim_2, r in shapes:
        matrices = mlp_shapes(dim_1, dim_2, [r] * config.n_layer)
        ordered = compress.spread_units(dense, text, dim_2)
        fisher = calibration.statistics(ordered, text).fisher
        fitted = compress.factorize(ordered, matrices)
        before = loss(fitted)
        fits = calibration.calibrate(ordered, fitted, text, fisher)
        cells = [f"{statistics.mean(getattr(f, f'{what}_error_before') for f in fits):.3f} → "
                 f"{statistics.mean(getattr(f, f'{what}_error') for f in fits):.3f}" for what in ("weight", "output")]
        rows.append((f"({dim_1}, {dim_2}, {r})", *cells, f"{before} → {loss(fitted)}"))
    return markdown(["shape of the MLPs", "error of the weights", "error of the output", "held-out loss"], rows)


def errors_of_base(dense):
    config, context = dense.config, dense.config.block_size
    text = data.calibration_text(DEMO_DATASET, CALIBRATION_TOKENS, config, "cpu")
    tokens = data.load_tokens(DEMO_DATASET, "val", config, context)
    held_out = data.sliding_windows(len(tokens) // context * context, context, context)
    return errors_table(dense, text, tokens, held_out, quarter_shapes(config))


def predicted_table(text):
    """The picture of predict.py, the budgets of its table, and what it says below."""
    lines = text.splitlines()
    table = [line for line in lines if line.startswith(("| compressed", "|---", "| budget"))]
    return "\n".join(["![Predicted against measured loss added](predicted.png)", "", *table, "", lines[-1]])


def shown(text):
    """A name or a table as the documents have it."""
    return re.sub(r"\bours\b", OURS, text)


def peers_table(rows):
    """The starts of one size of a comparison, the one with the lowest loss after training first, behind the dense model."""
    peers = [row for row in rows[1:] if row["name"].startswith(f"{HEADLINE_SIZE} ")]
    cells = [(shown(method(row["name"])), f"{row['parameters']:,}", f"{row['before']:.3f}",
              spread(row) if "runs" in row else "")  # the base is not trained further
             for row in [dense_start(rows) or rows[0], *sorted(peers, key=mean_loss)]]
    return markdown(["method", "parameters", "loss before training", "after"], cells) + f"\n\n{seeds_of(rows)} each."


def sizes_table(rows):
    """Losses before → after training: a row for each method, a column for each size."""
    trained = dense_start(rows)
    smaller = [row for row in rows[1:] if row is not trained]
    sizes = {row["name"].split()[0]: row["parameters"] for row in sorted(smaller, key=lambda row: -row["parameters"])}
    methods = dict.fromkeys(method(row["name"]) for row in sorted(smaller, key=lambda row: -row["before"]))
    cells = {(method(row["name"]), row["name"].split()[0]): f"{row['before']:.3f} → {spread(row)}" for row in smaller}
    head = "method", *(f"{size} ({n / rows[0]['parameters']:.0%})" for size, n in sizes.items())
    body = [(shown(name), *(cells.get((name, size), "") for size in sizes)) for name in methods]
    dense = f"{rows[0]['before']:.3f}" + (f" → {spread(trained)}" if trained else "")
    return (f"{markdown(head, body)}\n\nLosses on held-out text in nats per token, before → after training; "
            f"{seeds_of(rows)}. The dense model: {dense}.")


def bands_text(bands, C):
    """The bands [(rows, columns)] of an embedding, in words."""
    if len(bands) == 1:
        return f"rank {bands[0][1]}" if bands[0][1] < C else "dense"
    return f"{len(bands)} bands of {', '.join(str(columns) for _, columns in bands)} columns"


def plan_table(rows):
    """What a budget chose: widths and ranks of each block, and the columns of the embeddings."""
    row = next(row for row in rows if row["name"] == f"{PLAN_SIZE} ours")
    widths, kinds, C = row["widths"], list(rows[0]["shapes"]), rows[0]["widths"]["wte"][0][1]
    body = []
    for i, n_inner in enumerate(widths["n_inner"]):
        shapes = [row["shapes"][kind][i] for kind in kinds]
        ranks = [factors if dim_2 == 1 else "dense" for _, dim_2, factors in shapes]
        heads = [" ".join(map(str, widths[name][i])) for name in ("head_qk", "head_v")]
        body.append((i, *heads, n_inner, *ranks))
    head = "block", "queries and keys", "values", "hidden units", *(f"`{kind}`" for kind in kinds)
    return f"{markdown(head, body)}\n\nwte: {bands_text(widths['wte'], C)}; wpe: {bands_text(widths['wpe'], C)}."


def speed_table(results):
    """What bench.py measured of each model, with the dense model's value, in the same turns, over its own."""
    def cell(what, model):
        value, ratio = results[model]["measured"][what], results[model]["faster_than_dense"][what]
        text = f"{value / 1e9:.2f} GB" if what in ("peak memory", "file") else f"{value:.3g} s"
        return text if model == "dense" else f"{text} ({ratio:.2f})"

    rows = [(what, *(cell(what, model) for model in results)) for what in results["dense"]["measured"]]
    return markdown(["", *map(shown, results)], rows)


def runs_table(records):
    """Where each number comes from."""
    def cells(name):
        record = records.get(name, {})
        return [record.get(key, NOT_KNOWN) for key in ("commit", "machine", "minutes")]

    rows = [("report: parameters of GPT-2, costs of shapes", "`python -m experiments.figures`", "arithmetic", "", "")]
    rows += [(run.feeds, f"`python {run.command}`", *cells(name)) for name, run in RUNS.items()]
    return markdown(["figures", "command", "commit", "machine", "minutes"], rows, n_left=4)


# ---- all of it

def missing_runs(name=None):
    """The runs to make: those whose output is not there, and the one with this name, though it be there."""
    return [n for n, entry in RUNS.items()
            if n == name or not (Path(entry.output).exists() or (entry.reads and not Path(entry.reads).exists()))]


# name: (the runs that it is made of, a function of what they have made). The function of a picture takes its path, too.
TABLES = {
    "parameters": ([], lambda: parameters_table(KronyGPTConfig())),
    "shapes": ([], lambda: shapes_table(*KronyGPTConfig().sizes(0)["mlp.c_fc"], GPT2_SHAPES)),
    "step": ([], lambda: step_table(gpt2_models())),
    "runs": ([], lambda: runs_table(read_records())),
    "spectrum": (["demo_base"], lambda dense: spectrum_table(spectra_of(dense))),
    "errors": (["demo_base", "pydocs"], lambda dense, _: errors_of_base(dense)),
    "demo": (["demo"], lambda rows: shown(comparison_table(rows, "byte"))),
    "peers": (["compare_base"], peers_table),
    "sizes": (["compare_base"], sizes_table),
    "plan": (["compare_base"], plan_table),
    "compare_base": (["compare_base"], lambda rows: shown(comparison_table(rows))),
    "parts": (["compare_ablation"], comparison_table),
    "kronecker": (["compare_kronecker"], comparison_table),
    "predicted": (["predict"], predicted_table),
    "compare_bytes": (["compare_bytes"], lambda rows: shown(comparison_table(rows, "byte"))),
    "speed": (["bench"], speed_table),
}
PICTURES = {
    "spectrum": (["demo_base"], lambda dense, path: draw_spectrum(spectra_of(dense), path)),
    "base": (["base"], lambda _, path: shutil.copyfile("out/base/loss.png", path)),
    "pareto": (["compare_base"], draw_added),
    "parts": (["compare_ablation"], draw_parts),
    "predicted": (["predict"], lambda _, path: shutil.copyfile("out/predict_base/predicted.png", path)),
}


def made(runs, function, *args):
    """What a function makes of what some runs have made; None where one of them is not there."""
    found = [read(name) for name in runs]
    return None if any(result is None for result in found) else function(*found, *args)


def main(name=None):
    os.chdir(ROOT)
    if name and name not in RUNS:
        raise UserError(f"there is no run {name}: the runs are {', '.join(RUNS)}")
    if only and only not in TABLES | PICTURES:
        raise UserError(f"--only is one of {', '.join(TABLES | PICTURES)}, not {only}")
    for run_name in [name] * bool(name) if only else missing_runs(name):
        make(run_name)
    for picture, (runs, draw) in PICTURES.items():
        if only in ("", picture):
            made(runs, draw, f"docs/{picture}.png")
    tables = {n: made(*entry) if only in ("", n) else None for n, entry in TABLES.items()}
    rewrite_documents(DOCUMENTS, tables)
    missing = {run for n, (runs, _) in [*TABLES.items(), *PICTURES.items()] if only in ("", n) for run in runs
               if read(run) is None}
    print(f"wrote {only or 'all pictures and tables'}"
          + f"; those of {', '.join(sorted(missing))} stay as they were, for these runs are not there" * bool(missing))


if __name__ == "__main__":
    run(main)
