"""Make every picture and table of docs/report.md, and the tables of README.md, from runs of the repository.

    python -m experiments.figures                  # the runs that are missing, then all pictures and tables
    python -m experiments.figures compare_small    # ... and this run of the list below, again

Runs are the commands that a person would give, one after the other; one whose output is there is not repeated. The pictures
go to docs/*.png. A table stands in the documents between `<!-- table: NAME -->` and `<!-- end -->`, and what is between is
replaced; without its run it stays as it is. docs/runs.json keeps the commit, the machine and the minutes of each run.
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

from experiments.compare import markdown, mean_loss, spread, table
from experiments.pictures import dense_start
from kronygpt.configurator import UserError, run
from kronygpt.files import atomic_write
from kronygpt.run_dir import new_figure, save_figure

ROOT = Path(__file__).resolve().parent.parent
base = "out/demo/base/best.pt"  # the dense model of the spectra and errors
dataset = "pydocs"  # data/<dataset>, for calibration and losses
calibration_tokens = 131072  # number of its tokens
documents = "docs/report.md,README.md"  # comma list of the files with tables

# In this order: the first ones make what the others read. `feeds`: the tables and pictures that a run makes. `reads`: what
# no run makes; without it, the run is left out.
Run = namedtuple("Run", "command output feeds reads", defaults=(None,))
BYTES_BASE = "../shared/data/gpt2-bytes"  # as in config/compare_bytes.py
RUNS = {
    "pydocs": Run("-m experiments.prepare_pydocs", "data/pydocs/meta.json", "the text of all runs below"),
    "base": Run("train.py config/demo_base.py", base, "report: singular values, errors of the fits"),
    "demo": Run("-m experiments.compare config/compare_demo.py", "out/demo/results.json",
                "README and report: the demo's table"),
    "compare_bytes": Run("-m experiments.compare config/compare_bytes.py", "out/compare_bytes/results.json",
                         "README and report: results at width 256, ranks of each matrix", reads=BYTES_BASE),
    "compare_small": Run("-m experiments.compare config/compare_small.py", "out/compare_small/results.json",
                         "report: results at width 128, ranks of each matrix"),
    "predict": Run(f"-m experiments.predict --init_from={base} --calibrate=pydocs --out_dir=out/predict_small",
                   "out/predict_small/table.md", "report: predicted and measured loss"),
    "predict_bytes": Run(f"-m experiments.predict --init_from={BYTES_BASE} --calibrate=pydocs --shares=0.5,0.25 "
                         "--calibration_tokens=32768 --out_dir=out/predict_bytes", "out/predict_bytes/table.md",
                         "report: predicted and measured loss at width 256", reads=BYTES_BASE),
    "bench": Run("-m experiments.bench --repeats=3 --shapes='768,768,1 768,1,288,288'", "out/bench/results.json",
                 "README and report: speed at GPT-2's sizes"),
}
COPIED = {"docs/pareto.png": "out/demo/pareto.png", "docs/pareto_small.png": "out/compare_small/pareto.png",
          "docs/pareto_bytes.png": "out/compare_bytes/pareto.png", "docs/predicted.png": "out/predict_bytes/predicted.png",
          "docs/predicted_small.png": "out/predict_small/predicted.png"}  # pictures that runs have made
RECORDS = Path("docs/runs.json")
MADE_HERE = (":!*.md", ":!docs/*.png", f":!{RECORDS}")  # as git's patterns
MARKER = re.compile(r"<!-- table: (\w+) -->")
TABLE = re.compile(MARKER.pattern + ".*?<!-- end -->", re.DOTALL)
HEADLINE_SIZE = "1.7M"  # of the starts in the README's first table
GPT2_BUDGET = 82_000_000, 82_999_999  # parameters: what kron_decompose.py --budget=82M means
GPT2_SHAPES = [(768, 3072, 1), (768, 1536, 1), (384, 3072, 1), (768, 768, 1), (768, 1, 153), (256, 64, 36), (128, 32, 100),
               (32, 64, 4)]  # of c_fc
GPT2_RANK = 288  # of all matrices of GPT-2 with 82M parameters in all
LABELLED = {(768, 768): "Krony-PT", (768, 1): "low rank"}
COLORS = {"attn.c_attn": "C0", "attn.c_proj": "C1", "mlp.c_fc": "C2", "mlp.c_proj": "C3"}
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
    """Rewrite the tables of some files. UserError, before anything is written, where a table, its marker or its end is
    missing."""
    texts = {path: Path(path).read_text(encoding="utf-8") for path in paths}
    markers = {name for text in texts.values() for name in MARKER.findall(text)}
    if odd := markers ^ tables.keys():
        raise UserError(f"{' and '.join(paths)} differ from main() of experiments/figures.py in the tables {sorted(odd)}")
    for path, text in texts.items():
        if len(MARKER.findall(text)) != text.count("<!-- end -->"):
            raise UserError(f"{path} has a marker of a table without its <!-- end -->")
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
    import torch

    names = [line.partition(": ")[2] for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = f"{os.cpu_count()} cores, {names[0] if names else platform.processor() or platform.machine()}"
    return f"{cpu}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cpu


def read_lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def read_results(name):
    """The results.json of a run: the rows of a comparison, or what bench.py measured. None where it is not there."""
    path = Path(RUNS[name].output)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# ---- tables

def empty_model(config):
    """A KronyGPT without weights, which has the shapes of all parameters."""
    import torch

    from model import KronyGPT

    with torch.device("meta"):
        return KronyGPT(config)


def parameters_by_part(config):
    """{part of the model: number of parameters}, largest first."""
    from model import KINDS

    parts = dict.fromkeys(("token embedding = output matrix", *KINDS, "position embedding",
                           "biases and layer norms"), 0)
    names = {"transformer.wte.weight": "token embedding = output matrix", "transformer.wpe.weight": "position embedding"}
    for name, p in empty_model(config).named_parameters():
        kind = name.split(".", 3)[-1].removesuffix(".A")
        parts[names.get(name, kind if kind in parts else "biases and layer norms")] += p.numel()
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def parameters_table(config):
    parts = parameters_by_part(config)
    total = sum(parts.values())
    return markdown(["part", "parameters", "share"],
                    [(name, f"{n:,}", f"{n / total:.1%}") for name, n in (*parts.items(), ("in all", total))])


def shapes_table(m, n, shapes):
    """What shapes (dim_1, dim_2, r) of a matrix [m, n] cost: parameters, rank, and multiply-adds per token over dense."""
    from model import contraction_order, multiply_adds

    rows = []
    for dim_1, dim_2, r in shapes:
        is_dense = (dim_1, dim_2, r) == (m, n, 1)
        A, B = (r, dim_1, dim_2), (r, m // dim_1, n // dim_2)
        size = math.prod(A) + math.prod(B) * (not is_dense)
        rank = min(m, n, r * min(dim_1, dim_2) * min(m // dim_1, n // dim_2))
        macs = multiply_adds(A, B)
        cells = [f"{macs[order] / (m * n):.2f}" for order in "ABW"]
        cells = ["", "", "1.00", ""] if is_dense else [*cells, contraction_order(A, B, 1024)]
        rows.append((f"({dim_1}, {dim_2}, {r})", f"{size:,}", f"{size / (m * n):.1%}", rank, *cells))
    return markdown(["shape", "parameters", "of dense", "rank, at most", "A first", "B first", "W built",
                     "chosen for 1,024 tokens"], rows)


def step_table(configs):
    """Multiply-adds per token of a forward pass on full blocks, by part, of {name: KronyGPTConfig}."""
    from model import multiply_adds

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


def mlp_matrices(model):
    """The MLP matrices of all blocks as [C, n_inner]: c_fc, and c_proj transposed, whose shapes are the mirror images."""
    return [W.detach() for block in model.transformer.h for W in (block.mlp.c_fc.weight, block.mlp.c_proj.weight.T)]


def normalised_spectrum(W, dim_1, dim_2):
    """Singular values of the rearranged W over its norm, in descending order."""
    import torch

    from kronygpt.kron import rearrange

    sigma = torch.linalg.svdvals(rearrange(W.double().contiguous(), dim_1, dim_2))
    return sigma / sigma.norm()


def mean_spectra(matrices, shapes):
    """{(dim_1, dim_2, r): (spectrum of trained matrices, of random ones)}, means over the matrices."""
    import torch

    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(W.shape, generator=generator) for W in matrices]
    return {shape: [torch.stack([normalised_spectrum(W, *shape[:2]) for W in group]).mean(0) for group in (matrices, random)]
            for shape in shapes}


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
    from kronygpt import calibration, compress, data
    from model import mlp_shapes

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


def predicted_table(path):
    """The budgets of predict.py's table, and its last line. None where it is not there."""
    lines = read_lines(path)
    kept = [line for line in lines if line.startswith(("| compressed", "|---", "| budget"))]
    return "\n".join([*kept, "", lines[-1]]) if lines else None


def comparison_table(rows):
    """Losses of a comparison in nats per token, ± the standard deviation over seeds, and the rates where they differ."""
    return f"{markdown(*table(rows))}\n\nLosses on held-out text in nats per byte; {seeds(rows)}."


def seeds(rows):
    n = len(rows[1]["runs"])
    return f"{n} seed{'s' * (n > 1)}"


def peers_table(rows, size):
    """The starts of one size of a comparison, the one with the lowest loss after training first, behind the dense model."""
    peers = [row for row in rows[1:] if row["name"].startswith(f"{size} ")]
    cells = [(row["name"].removeprefix(f"{size} "), f"{row['parameters']:,}", f"{row['before']:.3f}", spread(row))
             for row in [dense_start(rows), *sorted(peers, key=mean_loss)]]
    return markdown(["start", "parameters", "loss before training", "after"], cells) + f"\n\n{seeds(rows)} each."


def matrices_of(rows):
    """{kind: (m, n)} of the matrices of a block, from the rows of a comparison, the first of which is dense."""
    return {kind: tuple(shapes[0][:2]) for kind, shapes in rows[0]["shapes"].items()}


def our_budgets(rows):
    """{"0.45M": shapes} of the starts of a comparison that share a budget among all matrices by predicted loss, largest
    first."""
    ours = [row for row in rows if re.fullmatch(r"\S+ ours", row["name"])]
    return {row["name"].split()[0]: row["shapes"] for row in sorted(ours, key=lambda row: -row["parameters"])}


def rank_share(m, n, shape):
    """The share of its parameters that a matrix [m, n] keeps in a shape (dim_1, dim_2, factors)."""
    dim_1, dim_2, r = shape
    return 1.0 if (dim_1, dim_2) == (m, n) else r * (dim_1 * dim_2 + m * n // (dim_1 * dim_2)) / (m * n)


def ranks_table(comparison):
    """The rank of each matrix of each block, and the share of its parameters that it keeps, at each budget of ours."""
    rows = []
    for budget, shapes in our_budgets(comparison).items():
        for kind, (m, n) in matrices_of(comparison).items():
            cells = ["dense" if tuple(s[:2]) == (m, n) else f"{s[2]} ({rank_share(m, n, s):.0%})" for s in shapes[kind]]
            rows.append((budget, kind, *cells))
    return markdown(["budget", "matrix", *(f"block {i}" for i in range(len(rows[0]) - 2))], rows, n_left=2)


def speed_table(results):
    """What bench.py measured of each model, with the dense model's value, in the same turns, over its own."""
    def cell(what, model):
        value = results[model]["measured"].get(what)
        if value is None:
            return ""
        ratio = results[model]["faster_than_dense"].get(what)
        text = f"{value / 1e9:.2f} GB" if what in ("peak memory", "file") else f"{value:.3g} s"
        return text if model == "dense" or ratio is None else f"{text} ({ratio:.2f})"

    rows = [(what, *(cell(what, model) for model in results)) for what in results["dense"]["measured"]]
    return markdown(["", *results], rows)


def runs_table(records):
    """Where each number comes from."""
    def cells(name):
        record = records.get(name, {})
        return [record.get(key, NOT_KNOWN) for key in ("commit", "machine", "minutes")]

    rows = [("report: parameters of GPT-2, costs of shapes", "`python -m experiments.figures`", "arithmetic", "", "")]
    rows += [(run.feeds, f"`python {run.command}`", *cells(name)) for name, run in RUNS.items()]
    return markdown(["figures", "command", "commit", "machine", "minutes"], rows, n_left=4)


# ---- pictures

def draw_parameters(config, path):
    """The parameters of a model by part, with their shares."""
    parts = parameters_by_part(config)
    total = sum(parts.values())
    figure = new_figure(8, 3.2)
    axes = figure.subplots()
    colors = [COLORS.get(name, "0.6") for name in parts]
    bars = axes.barh(list(parts), [n / 1e6 for n in parts.values()], color=colors)
    axes.bar_label(bars, [f" {n / 1e6:.1f}M, {n / total:.1%}" for n in parts.values()])
    axes.set(xlabel="parameters (millions)", title=f"GPT-2: {total / 1e6:.1f}M parameters; colored: what is compressed")
    axes.invert_yaxis()
    axes.margins(x=0.25)
    save_figure(figure, path)


def draw_spectrum(spectra, path):
    """Singular values of rearranged matrices, trained and random, a panel for each shape."""
    figure = new_figure(11, 3.6)
    panels = figure.subplots(1, len(spectra), squeeze=False)
    for axes, ((dim_1, dim_2, r), (trained, random)) in zip(panels[0], spectra.items()):
        for sigma, style, label in ((trained, "C2o-", "trained"), (random, "ks--", "random")):
            axes.plot(range(1, len(sigma) + 1), sigma, style, markersize=3, label=label)
        axes.axvline(r + 0.5, color="C3", label=f"r = {r}: kept to the left")
        highest = max(trained.max(), random.max()).item()
        axes.set(xlabel="product f", title=f"A is [{dim_1}, {dim_2}]", ylim=(0, 1.1 * highest))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0][0].set_ylabel("singular value over ‖W‖")
    save_figure(figure, path)


def draw_cost(shapes, path):
    """Rank and multiply-adds of budget.MLPShapes of one size."""
    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    axes.plot([s.rank for s in shapes], [s.multiply_adds for s in shapes], "o", color="0.6", markersize=4)
    for s in shapes:
        if name := LABELLED.get((s.dim_1, s.dim_2)):
            axes.plot(s.rank, s.multiply_adds, "C3o")
            axes.annotate(f"{name}: ({s.dim_1}, {s.dim_2}, {s.n_factors})", (s.rank, s.multiply_adds), xytext=(-8, -16),
                          textcoords="offset points", ha="right" if s.rank > max(t.rank for t in shapes) / 2 else "left")
    axes.axhline(1, color="k", linestyle=":")
    axes.annotate("dense", (0, 1), xytext=(2, 4), textcoords="offset points")
    axes.set(xlabel="rank of a matrix, at most", ylabel="multiply-adds of an MLP over dense", xlim=0, ylim=(0, 1.12),
             title=f"{len(shapes)} shapes of the MLPs, {min(s.parameters for s in shapes) / 1e6:.1f}M to "
                   f"{max(s.parameters for s in shapes) / 1e6:.1f}M parameters in all")
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def draw_ranks(rows, path):
    """The share of its parameters that each matrix keeps, block by block, a panel for each budget of ours."""
    budgets = our_budgets(rows)
    figure = new_figure(1.5 + 3 * len(budgets), 3.6)
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)
    for axes, (budget, shapes) in zip(panels[0], budgets.items()):
        for marker, (kind, (m, n)) in zip("osD^", matrices_of(rows).items()):
            axes.plot([100 * rank_share(m, n, s) for s in shapes[kind]], marker=marker, color=COLORS[kind], label=kind)
        axes.set(xlabel="block", title=budget, xticks=range(len(shapes["mlp.c_fc"])), ylim=(0, 104))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("% of its parameters kept")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    save_figure(figure, path)


# ---- all of it

def missing_runs(name=None):
    """The runs to make: those whose output is not there, and the one with this name, though it be there."""
    if name and name not in RUNS:
        raise UserError(f"there is no run {name}: the runs are {', '.join(RUNS)}")
    return [n for n, entry in RUNS.items()
            if n == name or not (Path(entry.output).exists() or (entry.reads and not Path(entry.reads).exists()))]


def main(name=None):
    os.chdir(ROOT)
    for missing in missing_runs(name):
        make(missing)

    from kronygpt import checkpoint, data
    from kronygpt.budget import shapes_within
    from model import KronyGPTConfig, Shape, mlp_shapes

    gpt2 = KronyGPTConfig()
    low_rank = {kind: [Shape(m, 1, GPT2_RANK)] * gpt2.n_layer for kind, (m, _) in gpt2.sizes(0).items()}
    models = {"dense": gpt2, "MLPs (768, 768, 1)": KronyGPTConfig(shapes=mlp_shapes(768, 768, [1] * gpt2.n_layer)),
              f"all matrices of rank {GPT2_RANK}": KronyGPTConfig(shapes=low_rank)}
    dense, _ = checkpoint.load(base)
    config = dense.config
    text = data.calibration_text(dataset, calibration_tokens, config, "cpu")
    tokens, context = data.load_tokens(dataset, "val", config, config.block_size), config.block_size
    held_out = [(begin, begin + 1, begin + context) for begin in range(0, len(tokens) - context + 1, context)]
    results = {n: read_results(n) for n in ("demo", "compare_small", "compare_bytes", "bench")}
    shapes = quarter_shapes(config)
    spectra = mean_spectra(mlp_matrices(dense), shapes)

    draw_parameters(gpt2, "docs/parameters.png")
    draw_spectrum(spectra, "docs/spectrum.png")
    draw_cost(shapes_within(gpt2, *GPT2_BUDGET), "docs/cost.png")
    draw_ranks(results["compare_small"], "docs/ranks.png")
    for copy, picture in COPIED.items():
        if Path(picture).exists():
            shutil.copyfile(picture, copy)

    tables = dict(
        parameters=parameters_table(gpt2),
        shapes=shapes_table(*gpt2.sizes(0)["mlp.c_fc"], GPT2_SHAPES),
        step=step_table(models),
        spectrum=spectrum_table(spectra),
        errors=errors_table(dense, text, tokens, held_out, shapes),
        predicted=predicted_table(RUNS["predict"].output),
        predicted_bytes=predicted_table(RUNS["predict_bytes"].output),
        ranks=ranks_table(results["compare_small"]),
        peers=results["compare_bytes"] and peers_table(results["compare_bytes"], HEADLINE_SIZE),
        ranks_bytes=results["compare_bytes"] and ranks_table(results["compare_bytes"]),
        speed=results["bench"] and speed_table(results["bench"]),
        runs=runs_table(read_records()),
        **{n: results[n] and comparison_table(results[n]) for n in ("demo", "compare_small", "compare_bytes")})
    rewrite_documents(documents.split(","), tables)
    print(f"wrote docs/*.png and the tables of {documents}")


if __name__ == "__main__":
    run(main)
