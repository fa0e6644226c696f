"""Speed and memory of KronyGPT against the dense model and against a torch.kron loop.

    python -m experiments.bench                                     # training, forward, generation, memory, file size
    python -m experiments.bench layer                               # one layer: each order of contraction, and the one chosen
    python -m experiments.bench --device=cuda --dtype=bfloat16
    python -m experiments.bench tokenize books.jsonl                # prepare_owt.py against nanoGPT's script, on local documents
    python -m experiments.bench score book.txt gpt2 VL_768_768_1.pt # perplexity.py against a loop over transformers' GPT-2

Models have GPT-2's sizes and random weights; the shapes are those of the MLPs, and a fourth number is the rank of attention
matrices: with 768,1,288,288 the whole model has 82M parameters, as with 768,768,1. Candidates run in turns in one process,
after a warm-up, and the median of each is reported. Read the ratios, not the seconds: above 1 is faster (smaller) than the
dense model. `models` writes table.md, results.json and ratios.png to out_dir.
"""
import glob
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from functools import partial
from itertools import cycle, product
from pathlib import Path

from experiments import pictures
from kronygpt.configurator import UserError, check_choice, check_range, run
from kronygpt.files import atomic_write, check_is_file

n_layer = 12  # blocks
n_head = 12  # attention heads
n_embd = 768  # width
vocab_size = 50257  # tokens in the vocabulary
block_size = 1024  # context, and tokens in a sequence of a training step
batch_size = 1  # sequences in a training step
memory_batch_size = 4  # sequences in the training step whose memory is measured
repeats = 5  # runs of each measurement; the median counts
new_tokens = 32  # tokens generated in a measurement
shapes = "768,768,1 768,1,288,288 768,1536,1 384,3072,1 256,64,10 768,1,153"  # dim_1,dim_2,factors[,attention rank]
layer_shapes = "768,3072,1 16,48,20 32,64,4 128,32,16 1,1,1 1,768,3 384,768,2 256,256,1 768,512,2"  # more, for `layer`
layer_tokens = "1 64 1024 4096"  # numbers of tokens, for `layer`
device = ""  # cuda, cpu, ...; default: CUDA if available
dtype = "float32"  # or bfloat16 or float16, by autocast
out_dir = "out/bench"  # directory of the table and the picture

CONTEXTS, SEQUENCES = (64, 900), (1, 8)  # of generation: tokens at the end, and sequences at once
ROOT = Path(__file__).resolve().parent.parent
LOOP_FACTORS = 16  # at most, of a torch.kron loop: it keeps as many whole matrices for the backward pass
HOPELESS = 4  # an order of contraction with this many times the multiply-adds of the best is not timed
NOTABLE = 1.15  # a chosen order that takes this many times the best is marked
FEW_TOKENS = 1024  # with fewer, a layer is fast and timed more often: these numbers times `repeats`
REPEATS_OF_FEW, REPEATS_OF_MANY = 20, 2
FLOAT = 4  # bytes
OUTPUTS = ("table.md", "results.json", "ratios.png")
NANOGPT_SHARDS = 1024  # pieces in which nanoGPT's script writes a .bin

# A torch.nn.Module with its calls loss(idx, targets) and generate(idx, max_new_tokens=n), for idx and targets (B, T)
Candidate = namedtuple("Candidate", "model loss generate flops_per_token")


def parse_numbers(text, n, n_more=0):
    """Parse an option such as "768,768,1 256,64,10" into tuples of n to n + n_more whole numbers from 1; UserError if it is
    not that."""
    pattern = ",".join(["[1-9][0-9]{0,8}"] * n) + f"(,[1-9][0-9]{{0,8}}){{0,{n_more}}}"
    if not text.strip() or not all(re.fullmatch(pattern, group) for group in text.split()):
        raise UserError(f"expected {'shapes such as 768,768,1 256,64,10' if n > 1 else 'numbers such as 1 64'}, not {text}")
    return [tuple(map(int, group.split(","))) for group in text.split()]


def make_config(shape, layers):
    """The KronyGPTConfig of a model with some layers and a shape: (dim_1, dim_2, factors), and perhaps attention's rank."""
    from model import KronyGPTConfig, Shape, mlp_shapes

    dim_1, dim_2, factors, *ranks = shape
    attention = {f"attn.{name}": [Shape(n_embd, 1, rank)] * layers for rank in ranks for name in ("c_attn", "c_proj")}
    return KronyGPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=layers, n_head=n_head, n_embd=n_embd,
                          shapes=mlp_shapes(dim_1, dim_2, [factors] * layers) | attention)


def run_script(script, *args):
    """Run a script of this directory and return what it prints; UserError if it fails."""
    command = [sys.executable, str(ROOT / script), *args]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        message = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"{script} failed: {message}", status=1)
    return done.stdout


def time_in_turns(function, names, n_turns, once=()):
    """{name: median seconds of function(name)} in turns, after a warm-up; for names in `once`, of a single cold run."""
    import torch

    def clock():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = {name: [] for name in names}
    for turn in range(1 + n_turns):
        for name in names:
            if turn == 0 or name not in once:
                start = clock()
                function(name)
                seconds[name].append(clock() - start)
    return {name: statistics.median(values[1:] or values) for name, values in seconds.items()}


def make_candidates(shape, is_first):
    """{name: Candidate} to measure in turns: the dense model, ours, and a torch.kron loop unless it has many factors; with
    the first shape also transformers' GPT-2, and ours with its loss from whole logits."""
    import torch
    from torch.nn import functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    from model import KronyGPT

    def loss_of_whole_logits(logits_of, idx, targets):
        return F.cross_entropy(logits_of(idx).flatten(0, 1).float(), targets.flatten())

    def multiply_by_kron_loop(matrix, x):
        return x @ sum(torch.kron(a, b) for a, b in zip(matrix.A, matrix.B)) + matrix.bias

    @torch.no_grad()
    def generate_without_cache(model, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, model(idx)[:, -1:].argmax(-1)), dim=1)
        return idx

    def ours(shape, whole_logits=False):
        model = KronyGPT(make_config(shape, n_layer))
        loss = partial(loss_of_whole_logits, model) if whole_logits else model
        return Candidate(model, loss, partial(model.generate, temperature=0), model.flops_per_token())

    candidates = {"dense": ours((n_embd, 4 * n_embd, 1)), f"ours {shape}": ours(shape)}
    if max(shape[2:]) <= LOOP_FACTORS:
        loop = ours(shape, whole_logits=True)
        for _, _, matrix in loop.model.matrices():
            if not matrix.is_dense:
                matrix.forward = partial(multiply_by_kron_loop, matrix)
        generate = partial(generate_without_cache, loop.model)
        candidates[f"torch.kron {shape}"] = loop._replace(generate=generate, flops_per_token=None)
    if is_first:
        gpt2 = GPT2LMHeadModel(GPT2Config(
            n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size, vocab_size=vocab_size, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None))  # no token ends a text early
        loss = partial(loss_of_whole_logits, lambda idx: gpt2(idx).logits)
        candidates["transformers dense"] = Candidate(gpt2, loss, partial(gpt2.generate, do_sample=False), None)
        candidates[f"whole logits {shape}"] = ours(shape, whole_logits=True)
    return candidates


def measure(candidates, device):
    """Measure candidates in turns: {name: {measurement: seconds, or bytes}}."""
    import torch

    from kronygpt.device import autocast_to, peak_memory

    idx = torch.randint(vocab_size, (max(batch_size, memory_batch_size), block_size + 1),
                        generator=torch.Generator().manual_seed(0)).to(device)
    results = {name: {} for name in candidates}

    def step(name, n, is_training):
        with torch.set_grad_enabled(is_training), autocast_to(device, dtype):
            loss = candidates[name].loss(idx[:n, :-1], idx[:n, 1:])
        if is_training:
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

    def generate(name, sequences, context):
        with autocast_to(device, dtype):
            candidates[name].generate(idx[:1, :context - new_tokens].repeat(sequences, 1), max_new_tokens=new_tokens)

    def record(what, values):
        for name, value in values.items():
            results[name][what] = value
        unit, size = ("GB", 1e9) if what == "peak memory" else ("s", 1)
        print(f"  {what}: " + ", ".join(f"{name} {value / size:.3g} {unit}" for name, value in values.items()), flush=True)

    optimizers = {name: torch.optim.AdamW(c.model.to(device).parameters(), fused=True) for name, c in candidates.items()}
    record("training step", time_in_turns(partial(step, n=batch_size, is_training=True), candidates, repeats))
    peaks = {name: peak_memory(partial(step, name, memory_batch_size, is_training=True), device) for name in candidates}
    record("peak memory", {name: peak for name, peak in peaks.items() if peak is not None})
    optimizers.clear()
    record("forward", time_in_turns(partial(step, n=batch_size, is_training=False), candidates, repeats))
    loops = [name for name in candidates if name.startswith("torch.kron")]  # these take minutes at long contexts
    for sequences, context in product(SEQUENCES, sorted({min(context, block_size) for context in CONTEXTS})):
        names = [name for name in candidates if name not in loops or sequences * context <= max(CONTEXTS)]
        once = loops if context == max(CONTEXTS) else ()
        seconds = time_in_turns(partial(generate, sequences=sequences, context=context), names, repeats, once)
        record(f"generation {sequences} × {context}", seconds)
    for name, candidate in candidates.items():
        file = io.BytesIO()
        torch.save(candidate.model.state_dict(), file)
        results[name]["file"] = file.tell()
    return results


def bench_models():
    """Measure the models of each shape against the dense one."""
    from kronygpt.device import Speed, check_memory, pick_device

    check_range(globals(), "new_tokens", below=min(*CONTEXTS, block_size))
    for name in OUTPUTS:
        check_is_file(Path(out_dir, name))
    measured_shapes, torch_device = parse_numbers(shapes, 3, 1), pick_device(device)
    for shape in measured_shapes:
        make_config(shape, 1)  # which says what is wrong with it now
    parameters = 12 * n_layer * n_embd**2 + (vocab_size + block_size) * n_embd
    activations = max(batch_size, memory_batch_size) * block_size * n_layer * n_embd
    check_memory(FLOAT * (parameters + activations), torch_device, "a training step of these sizes")
    speed, results = Speed(torch_device, dtype), {}
    print(f"mfu is a share of {speed}: {torch_device}, {dtype}")
    for shape in measured_shapes:
        candidates = make_candidates(shape, is_first=not results)
        print(", ".join(candidates))
        measured = measure(candidates, torch_device)
        for name, candidate in candidates.items():
            ratios = {what: measured["dense"][what] / value for what, value in measured[name].items() if value}
            flops = (candidate.flops_per_token or 0) * batch_size * block_size / measured[name]["training step"]
            results.setdefault(name, dict(measured=measured[name], faster_than_dense=ratios, mfu=speed.mfu(flops)))
        del candidates, candidate  # before the next ones are made
    columns = list(results["dense"]["measured"])
    lines = [f"| model | {' | '.join(columns)} | mfu |", "|---|" + "---:|" * (len(columns) + 1)]
    for name, result in results.items():
        ratios, mfu = result["faster_than_dense"], result["mfu"]
        cells = [f"{ratios[column]:.2f} ×" if column in ratios else "" for column in columns]
        lines.append(f"| {' | '.join([name, *cells, f'{mfu:.0%}' if mfu else ''])} |")
    for path, content in (("table.md", "\n".join(lines)), ("results.json", json.dumps(results, indent=2, allow_nan=False))):
        with atomic_write(Path(out_dir, path), "w") as file:
            file.write(content + "\n")
    print("\ntimes and sizes of the dense model over those of each (above 1: faster, smaller)", *lines, sep="\n")
    draw({name: result["faster_than_dense"] for name, result in results.items() if name != "dense"}, columns)


def draw(ratios, columns):
    """Draw ratios.png from {model: {measurement: ratio}}."""
    figure = pictures.new_figure(9, 1 + 0.6 * len(columns))
    axes = figure.subplots()
    for (name, values), marker in zip(ratios.items(), cycle(pictures.MARKERS)):
        axes.plot([values.get(column, math.nan) for column in columns], columns, marker, label=name)
    axes.axvline(1, color="k", linewidth=1)
    axes.set(xscale="log", xlabel="times faster (smaller) than the dense model")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.invert_yaxis()
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    pictures.save(figure, Path(out_dir, "ratios.png"))


def time_orders(A_shape, B_shape, tokens, device):
    """{"forward" or "backward": {order: median seconds}} of the orders of contraction that are not hopeless, for x (tokens,
    m1 m2), A_shape (r, m1, n1) and B_shape (r, m2, n2). Backward includes its forward."""
    import torch

    from kronygpt.device import autocast_to
    from model import kron_linear, multiply_adds

    (r, m1, n1), (_, m2, n2) = A_shape, B_shape
    inputs = [torch.randn(shape, device=device, requires_grad=True)
              for shape in ((tokens, m1 * m2), A_shape, B_shape, (n1 * n2,))]  # x, A, B, bias
    grad = torch.randn(tokens, n1 * n2, device=device)
    macs = multiply_adds(A_shape, B_shape)
    macs["W"] += r * m1 * m2 * n1 * n2 / tokens  # to build it

    def multiply(order, is_training):
        with torch.set_grad_enabled(is_training), autocast_to(device, dtype):
            y = kron_linear(*inputs, order)
        if is_training:
            torch.autograd.grad(y, inputs, grad.to(y.dtype))

    n_turns = repeats * (REPEATS_OF_FEW if tokens < FEW_TOKENS else REPEATS_OF_MANY)
    orders = [order for order, n in macs.items() if n <= HOPELESS * min(macs.values())]
    return {what: time_in_turns(partial(multiply, is_training=what == "backward"), orders, n_turns)
            for what in ("forward", "backward")}


def bench_layer():
    """Compare the order of contraction that is chosen with the fastest, for matrices of MLPs and numbers of tokens."""
    from kronygpt.device import check_memory, pick_device
    from model import contraction_order

    torch_device = pick_device(device)
    measured_shapes = list(dict.fromkeys(shape[:3] for shape in parse_numbers(f"{shapes} {layer_shapes}", 3, 1)))
    numbers, configs = parse_numbers(layer_tokens, 1), {shape: make_config(shape, 1) for shape in measured_shapes}
    largest = max(numbers)[0]
    check_memory(FLOAT * largest * 5 * n_embd, torch_device, f"a layer of {largest:,} tokens")  # x and y
    choices = {"forward": [], "backward": []}  # of (time over the best, shape, matrix, tokens)
    print(f"{'shape':>14} {'matrix':>6} {'tokens':>6} {'':>8} {'A first':>9} {'B first':>9} {'W':>9}  chosen, over the best")
    for shape, matrix, (tokens,) in product(measured_shapes, ("c_fc", "c_proj"), numbers):
        config = configs[shape]
        m, n, (dim_1, dim_2, r) = config.size_and_shape(f"mlp.{matrix}", layer=0)
        A_shape, B_shape = (r, dim_1, dim_2), (r, m // dim_1, n // dim_2)
        chosen = contraction_order(A_shape, B_shape, tokens)
        for what, seconds in time_orders(A_shape, B_shape, tokens, torch_device).items():
            over = seconds[chosen] / min(seconds.values())
            choices[what].append((over, shape, matrix, tokens))
            cells = [f"{seconds[order] * 1e3:>7.2f}ms" if order in seconds else f"{'-':>9}" for order in "ABW"]
            print(f"{shape!s:>14} {matrix:>6} {tokens:>6} {what:>8} {' '.join(cells)}  {chosen} {over:.2f}"
                  f"{f'  <- over {NOTABLE}' if over > NOTABLE else ''}", flush=True)
    for what, rows in choices.items():
        print(f"{what}: {sum(over > NOTABLE for over, *_ in rows)} of {len(rows)} choices take over {NOTABLE} times the "
              f"best; the worst: {max(rows)}")


def bench_tokenize(path):
    """Compare prepare_owt.py with nanoGPT's script on the documents of a .jsonl, from loaded documents to train.bin."""
    import numpy as np
    import tiktoken

    from prepare_owt import gathered, read_documents

    if not (os.path.isfile(path) and os.path.getsize(path)):
        raise UserError(f"no documents in {path}: give a .jsonl file with a `text` in each line")
    start = time.perf_counter()
    output = run_script("prepare_owt.py", f"--data_files={glob.escape(str(Path(path).resolve()))}", "--out=bench_tokenize")
    whole_seconds = time.perf_counter() - start
    ours = float(re.search(r"tokenized .* in ([\d.]+) s", output)[1])

    encoding = tiktoken.get_encoding("gpt2")

    def process(example):
        ids = [*encoding.encode_ordinary(example["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    with gathered(read_documents(path)) as (documents, _), tempfile.TemporaryDirectory() as folder:
        documents = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["train"]
        start = time.perf_counter()
        tokenized = documents.map(process, remove_columns=["text"], num_proc=os.cpu_count(), load_from_cache_file=False)
        map_seconds = time.perf_counter() - start
        array = np.memmap(Path(folder, "train.bin"), dtype=np.uint16, mode="w+", shape=(sum(tokenized["len"]),))
        end = 0
        for shard in range(shards := min(NANOGPT_SHARDS, len(tokenized))):
            piece = tokenized.shard(shards, shard, contiguous=True).with_format("numpy")
            tokens = np.concatenate(piece["ids"])
            array[end:end + len(tokens)] = tokens
            end += len(tokens)
        array.flush()
        theirs = time.perf_counter() - start
        is_same = array.tobytes() == Path("data/bench_tokenize/train.bin").read_bytes()
    print(f"{output}nanoGPT's script: {theirs:.1f} s, of which datasets.map takes {map_seconds:.1f} s\n"
          f"prepare_owt.py: {ours:.1f} s ({whole_seconds:.1f} s with its start and loading), {theirs / ours:.2f} times as "
          f"fast, {map_seconds / ours:.2f} times as datasets.map alone; the same bytes: {is_same}")


def bench_score(path, dense, ckpt):
    """Compare tokens/s of perplexity.py, for a dense and a compressed model, with a plain loop over transformers' GPT-2."""
    import torch

    from kronygpt import checkpoint, export
    from kronygpt.device import autocast_to, pick_device
    from perplexity import load_text_tokens

    torch_device = pick_device(device)

    def script(source):
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "result.json")
            run_script("perplexity.py", source, path, f"--device={torch_device}", f"--dtype={dtype}", f"--json_out={result}")
            return json.loads(result.read_text())[path]["tokens_per_second"]

    script(dense), script(ckpt)  # a warm-up, which also reads the text and the models, and says what is wrong with them
    model, _ = checkpoint.load(dense)
    tokens, _ = load_text_tokens(path, model.config)
    tokens = torch.tensor(tokens.astype("int64"))
    model = export.to_dense(model).to(torch_device)

    def loop():
        start = time.perf_counter()
        with torch.no_grad(), autocast_to(torch_device, dtype):
            for window in tokens.to(torch_device).split(model.config.n_positions):
                model(window[None], labels=window[None]).loss.item()
        return len(tokens) / (time.perf_counter() - start)

    ways = {"transformers, one window at a time": loop, f"perplexity.py, dense: {dense}": partial(script, dense),
            f"perplexity.py, compressed: {ckpt}": partial(script, ckpt)}
    turns = [{name: way() for name, way in ways.items()} for _ in range(repeats)]
    medians = {name: statistics.median(turn[name] for turn in turns) for name in ways}
    for name, speed in medians.items():
        print(f"{name}: {speed:,.0f} tokens/s, {speed / next(iter(medians.values())):.2f} times the loop")


def main(command="models", path=None, dense=None, ckpt=None):
    commands = {("models", 0): bench_models, ("layer", 0): bench_layer, ("tokenize", 1): bench_tokenize,
                ("score", 3): bench_score}
    arguments = [argument for argument in (path, dense, ckpt) if argument is not None]
    if (command, len(arguments)) not in commands:
        raise UserError("bench.py takes models, layer, tokenize DOCUMENTS.jsonl, or score TEXT DENSE_MODEL MODEL")
    check_range(globals(), "n_layer n_head n_embd vocab_size block_size batch_size memory_batch_size repeats new_tokens",
                at_least=1, at_most=10**9)
    check_choice(globals(), "dtype", "float32", "bfloat16", "float16")
    commands[command, len(arguments)](*arguments)


if __name__ == "__main__":
    run(main)
