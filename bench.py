"""How fast it is: KronyGPT beside the dense model and beside building every matrix with torch.kron.

    python bench.py                                     # training, forward, generation, memory, file size
    python bench.py layer                               # one layer: every order of contraction, and which was chosen
    python bench.py --device=cuda --dtype=bfloat16
    python bench.py tokenize books.jsonl                # prepare_owt.py's way beside nanoGPT's, on local documents
    python bench.py score book.txt gpt2 VL_768_768_1.pt # perplexity.py beside a loop over transformers' GPT-2

All models have GPT-2's shape and random weights. What is compared runs in turns in one process, after a warm-up, and
the medians count. Ratios say more than seconds: above 1 is faster than dense. Writes table.md and ratios.png to out_dir.
"""
import json
import re
import statistics
import sys
import time
from pathlib import Path

from configurator import UsageError, run

n_layer = 12  # blocks
n_head = 12  # attention heads
n_embd = 768  # width
vocab_size = 50257  # words
block_size = 1024  # tokens in a training step's sequence
batch_size = 1  # sequences in a training step
memory_batch_size = 4  # sequences in the step whose memory is measured
repeats = 5  # of each measurement; the median counts
new_tokens = 32  # generated in a measurement
shapes = "768,768,1 768,1536,1 384,3072,1 256,64,10 768,1,153"  # (dim_1, dim_2, factors) to measure
layer_shapes = "768,3072,1 16,48,20 32,64,4 128,32,16 1,1,1 1,768,3 384,768,2 256,256,1 768,512,2"  # for `layer`, besides
layer_tokens = "1 64 1024 4096"  # numbers of tokens for `layer`
device = ""  # cuda, cpu, ...: what there is if left out
dtype = "float32"  # or bfloat16, by autocast
out_dir = "out/bench"  # where the table and the picture go

CONTEXTS, SEQUENCES = (64, 900), (1, 8)  # of generation: tokens at the end, and sequences at once
NANOGPT_SHARDS = 1024  # pieces in which its script writes
SLOWEST = 4  # an order of contraction with so many times the multiply-adds of the best is not timed


def parse_shapes(text):
    try:
        parsed = [tuple(map(int, shape.split(","))) for shape in text.split()]
        if any(len(shape) != 3 for shape in parsed):
            raise ValueError
    except ValueError:
        raise UsageError(f"shapes are written 768,768,1 256,64,10, not {text!r}") from None
    return parsed


def synchronize():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_in_turns(functions, times=None, once=()):
    """Median seconds of each function, called in turns after a warm-up: {name: seconds}; those named in `once` are
    called a single time, cold."""
    for name, function in functions.items():
        if name not in once:
            function()
    seconds = {name: [] for name in functions}
    for turn in range(times or repeats):
        for name, function in functions.items():
            if turn and name in once:
                continue
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(function, where):
    """Bytes that a call needs at most, above what was there before; None where that cannot be told."""
    import ctypes

    import torch

    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")  # of Linux
    if not status.exists():
        return None

    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that it does not count as there before

    def read(field):
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


def make_models(where):
    """{name: model}: dense, transformers' GPT-2 and for each shape the torch.kron loop and ours; made when asked for."""
    from functools import partial

    import torch
    from torch.nn import functional as F

    from model import KronyGPT, KronyGPTConfig

    class WholeLogitsGPT(KronyGPT):
        """Ours, but for the loss: from all of the logits at once."""

        def forward(self, idx, targets=None):
            logits = self.lm_head(self.hidden(idx))
            if targets is None:
                return logits
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    class KronLoopGPT(WholeLogitsGPT):
        """The baseline: every dense matrix built by a loop over torch.kron, whole logits, no cache."""

        def __init__(self, config):
            super().__init__(config)
            for block in self.transformer.h:
                block.mlp.forward = partial(self.mlp, block.mlp)

        @staticmethod
        def mlp(mlp, x):
            W_fc, W_proj = (sum(torch.kron(a, b) for a, b in zip(A, B)) for A, B in mlp.factor_pairs())
            hidden = F.gelu(x @ W_fc + mlp.c_fc_bias, approximate="tanh")
            return hidden @ W_proj + mlp.c_proj_bias

        @torch.no_grad()
        def generate(self, idx, max_new_tokens, temperature):
            for _ in range(max_new_tokens):
                idx = torch.cat((idx, self(idx)[:, -1].argmax(-1, keepdim=True)), dim=1)
            return idx

    class TransformersGPT2(torch.nn.Module):
        """transformers' GPT-2 without dropout, with the methods that are measured here."""

        def __init__(self):
            from transformers import GPT2Config, GPT2LMHeadModel

            super().__init__()
            self.model = GPT2LMHeadModel(GPT2Config(
                n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size, vocab_size=vocab_size,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))

        def forward(self, idx, targets):
            return F.cross_entropy(self.model(idx).logits.flatten(0, 1).float(), targets.flatten())

        @torch.no_grad()
        def generate(self, idx, max_new_tokens, temperature):
            return self.model.generate(idx, min_new_tokens=max_new_tokens, max_new_tokens=max_new_tokens,
                                       do_sample=False, attention_mask=torch.ones_like(idx), pad_token_id=0)

        def configure_optimizers(self, *args):
            return torch.optim.AdamW(self.parameters(), fused=where.type == "cuda")

    def config(dim_1=None, dim_2=None, factors=1):
        return KronyGPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                              n_embd=n_embd, dim_1=dim_1, dim_2=dim_2, factors=factors)

    makers = {"dense": lambda: KronyGPT(config()), "transformers dense": TransformersGPT2}
    for shape in parse_shapes(shapes):
        for name, kind in (("torch.kron", KronLoopGPT), ("whole logits", WholeLogitsGPT), ("ours", KronyGPT)):
            makers[f"{name} {shape}"] = partial(lambda kind, shape: kind(config(*shape)), kind, shape)
    return makers


def measure_models(models, where):
    """{model name: {measurement: seconds, or bytes}} of the models, which run in turns."""
    import os
    import tempfile

    import torch

    from model import autocast_to

    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(vocab_size, (memory_batch_size, block_size + 1), generator=generator).to(where)
    optimizers = {name: model.configure_optimizers(1e-4, 0.1, (0.9, 0.95)) for name, model in models.items()}

    def loss(model, n):
        with autocast_to(where.type, dtype):
            return model(idx[:n, :-1], idx[:n, 1:])

    def step(name, n):
        loss(models[name], n).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    def forward(name):
        with torch.no_grad():
            loss(models[name], batch_size)

    def generate(name, sequences, context):
        prompt = idx[:1, :context - new_tokens].repeat(sequences, 1)
        with autocast_to(where.type, dtype):
            models[name].generate(prompt, new_tokens, temperature=0)

    results = {name: {} for name in models}

    def record(what, values):
        for name, value in values.items():
            results[name][what] = value
        print(f"  {what}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()), flush=True)

    for model in models.values():
        model.to(where).train()
    record("training step", time_in_turns({name: lambda name=name: step(name, batch_size) for name in models}))
    record("peak memory", {name: peak_memory(lambda name=name: step(name, memory_batch_size), where) for name in models})
    optimizers.clear()
    for model in models.values():
        model.eval()
    record("forward", time_in_turns({name: lambda name=name: forward(name) for name in models}))
    for sequences in SEQUENCES:
        for context in CONTEXTS:
            calls = {name: lambda name=name, s=sequences, c=context: generate(name, s, c) for name in models
                     if sequences * context <= max(CONTEXTS) or not name.startswith("torch.kron")}  # minutes otherwise
            slow = [name for name in calls if name.startswith("torch.kron") and context == max(CONTEXTS)]
            record(f"generation {sequences} × {context}", time_in_turns(calls, once=slow))
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.save(model.state_dict(), f"{folder}/model.pt")
            results[name]["file"] = os.path.getsize(f"{folder}/model.pt")
    return results


def bench_models(where):
    """Every model beside the dense one, a shape at a time."""
    from model import matmul_flops

    limit = matmul_flops(where, dtype)
    print(f"a large matrix product runs at {limit / 1e9:,.0f} GFLOP/s here ({where}, {dtype})")
    makers = make_models(where)
    results, lines = {}, []
    groups = [["dense", f"torch.kron {shape}", f"ours {shape}"] for shape in parse_shapes(shapes)]
    groups[0] += ["transformers dense", f"whole logits {parse_shapes(shapes)[0]}"]
    for group in groups:
        print(", ".join(group))
        models = {name: makers[name]() for name in group}
        flops = {name: model.flops_per_token() for name, model in models.items() if hasattr(model, "flops_per_token")}
        measured = measure_models(models, where)
        for name in group:
            share = ""
            if name in flops and not name.startswith("torch.kron"):
                rate = flops[name] * batch_size * block_size / measured[name]["training step"]
                share = f"{rate / limit:.0%}"
            ratios = {what: measured["dense"][what] / value for what, value in measured[name].items() if value}
            if name != "dense" or "dense" not in results:
                results[name] = dict(measured=measured[name], faster_than_dense=ratios)
                lines.append((name, share, ratios))
        del models
    columns = list(results["dense"]["measured"])
    print_and_write_table(lines, columns)
    Path(out_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, columns)


def print_and_write_table(lines, columns):
    text = [f"| model | {' | '.join(columns)} | share of the limit |", "|---|" + "---:|" * (len(columns) + 1)]
    for name, share, ratios in lines:
        cells = [f"{ratios[column]:.2f} ×" if column in ratios else "" for column in columns]
        text.append(f"| {name} | {' | '.join(cells)} | {share} |")
    Path(out_dir, "table.md").write_text("\n".join(text) + "\n")
    print("\ntimes and sizes of the dense model over those of each (above 1: faster, smaller)\n" + "\n".join(text))


def draw(results, columns):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in results if name != "dense"]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(columns) * (len(names) + 1) / 4 + 1.5), layout="constrained")
    height = 0.85 / len(names)
    for i, name in enumerate(names):
        ratios = results[name]["faster_than_dense"]
        places = [(row + i * height, ratios[column]) for row, column in enumerate(columns) if column in ratios]
        axes.barh(*zip(*places), height=height, label=name)
    axes.axvline(1, color="k", linewidth=1)
    axes.set(yticks=[row + 0.4 for row in range(len(columns))], yticklabels=columns, xscale="log",
             xlabel="times faster (smaller) than the dense model")
    axes.invert_yaxis()
    axes.legend(fontsize="small")
    axes.grid(axis="x", alpha=0.3, which="both")
    figure.savefig(Path(out_dir, "ratios.png"), dpi=120)


def bench_layer(where):
    """Every order of contraction of one layer, forward and with backward, and the order that was chosen."""
    import torch

    from model import KronyGPTConfig, autocast_to, contraction_order, kron_linear, multiply_adds

    print(f"{'shape':>14} {'matrix':>6} {'tokens':>6} {'':>8} {'A first':>9} {'B first':>9} {'W':>9}  chosen, over the best")
    worst = {"forward": [], "backward": []}
    for shape in parse_shapes(f"{shapes} {layer_shapes}"):
        m1, n1, m2, n2 = KronyGPTConfig(n_embd=n_embd, n_head=n_head, dim_1=shape[0], dim_2=shape[1]).sides
        r = shape[2]
        for matrix, sides in (("c_fc", (m1, n1, m2, n2)), ("c_proj", (n1, m1, n2, m2))):
            for tokens in map(int, layer_tokens.split()):
                p1, q1, p2, q2 = sides
                x = torch.randn(tokens, p1 * p2, device=where, requires_grad=True)
                A = torch.randn(r, p1, q1, device=where, requires_grad=True)
                B = torch.randn(r, p2, q2, device=where, requires_grad=True)
                bias = torch.zeros(q1 * q2, device=where, requires_grad=True)
                grad = torch.randn(tokens, q1 * q2, device=where)
                macs = {order: n + (order == "W") * r * p1 * q1 * p2 * q2 / tokens
                        for order, n in multiply_adds(sides, r).items()}
                orders = [order for order, n in macs.items() if n <= SLOWEST * min(macs.values())]

                def forward(order, x=x, A=A, B=B, bias=bias):
                    with torch.no_grad(), autocast_to(where.type, dtype):
                        kron_linear(x, A, B, bias, order)

                def backward(order, x=x, A=A, B=B, bias=bias, grad=grad):
                    with autocast_to(where.type, dtype):
                        y = kron_linear(x, A, B, bias, order)
                    y.backward(grad.to(y.dtype))
                    x.grad = A.grad = B.grad = bias.grad = None

                chosen = contraction_order(sides, r, tokens)
                for what, function in (("forward", forward), ("backward", backward)):
                    calls = {order: lambda order=order, f=function: f(order) for order in orders}
                    seconds = time_in_turns(calls, repeats * (20 if tokens < 1024 else 2))
                    over = seconds[chosen] / min(seconds.values())
                    worst[what].append((over, shape, matrix, tokens))
                    cells = [f"{seconds[order] * 1e3:>7.2f}ms" if order in seconds else f"{'-':>9}" for order in "ABW"]
                    print(f"{shape!s:>14} {matrix:>6} {tokens:>6} {what:>8} {' '.join(cells)}  {chosen} {over:.2f}"
                          f"{'  <- over 1.15' if over > 1.15 else ''}", flush=True)
    for what, rows in worst.items():
        print(f"{what}: {sum(over > 1.15 for over, *_ in rows)} of {len(rows)} choices cost over 15% more than the best; "
              f"the worst {max(rows)}")


def bench_tokenize(path):
    """The documents of a .jsonl through prepare_owt.py and through nanoGPT's way, from loaded documents to a .bin."""
    import subprocess
    import tempfile

    import numpy as np
    import tiktoken
    from datasets import load_dataset

    encoding = tiktoken.get_encoding("gpt2")

    def process(example):
        ids = [*encoding.encode_ordinary(example["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    script = str(Path(__file__).with_name("prepare_owt.py"))
    start = time.perf_counter()
    said = subprocess.run([sys.executable, script, f"--data_files={Path(path).resolve()}", "--out=bench_tokenize"],
                          check=True, capture_output=True, text=True).stdout
    whole = time.perf_counter() - start
    ours = float(re.search(r"tokenized .* in ([\d.]+) s", said)[1])

    documents = load_dataset("json", data_files=path, split="train")
    documents = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["train"]
    start = time.perf_counter()
    tokenized = documents.map(process, remove_columns=["text"], num_proc=2, load_from_cache_file=False)
    mapped = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        array = np.memmap(Path(folder, "train.bin"), dtype=np.uint16, mode="w+", shape=(sum(tokenized["len"]),))
        end = 0
        for shard in range(NANOGPT_SHARDS):
            piece = tokenized.shard(NANOGPT_SHARDS, shard, contiguous=True).with_format("numpy")
            tokens = np.concatenate(piece["ids"])
            array[end:end + len(tokens)] = tokens
            end += len(tokens)
        array.flush()
        theirs = time.perf_counter() - start
        same = array.tobytes() == Path("data/bench_tokenize/train.bin").read_bytes()
    print(said, end="")
    print(f"nanoGPT's way, from loaded documents to train.bin: {theirs:.1f} s, of which datasets.map took {mapped:.1f} s\n"
          f"prepare_owt.py: {ours:.1f} s ({whole:.1f} s with its start and loading); {theirs / ours:.2f} times as fast, "
          f"{mapped / ours:.2f} times as datasets.map alone; the same bytes: {same}")


def bench_score(path, dense, ckpt, where):
    """A text through perplexity.py, for the dense model and a compressed one, and through a loop over transformers'
    GPT-2, a window at a time; in turns, and the medians of their tokens/s count."""
    import subprocess
    import tempfile

    import tiktoken
    import torch
    from transformers import GPT2LMHeadModel

    tokens = torch.tensor(tiktoken.get_encoding("gpt2").encode_ordinary(Path(path).read_text(encoding="utf-8")))
    model = GPT2LMHeadModel.from_pretrained(dense).to(where).eval()
    context = model.config.n_positions

    def loop():
        start, total = time.perf_counter(), 0.0
        with torch.no_grad():
            for begin in range(0, len(tokens) - 1, context):
                window = tokens[None, begin:begin + context].to(where)
                total += model(window, labels=window).loss.item() * (window.shape[1] - 1)
        return len(tokens) / (time.perf_counter() - start)

    def script(source):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, str(Path(__file__).with_name("perplexity.py")), source, path,
                            f"--device={where}", f"--json_out={folder}/result.json"], check=True, capture_output=True)
            return json.loads(Path(folder, "result.json").read_text())[path]["tokens_per_second"]

    ways = {"transformers, a window at a time": loop, f"perplexity.py {dense}": lambda: script(dense),
            f"perplexity.py {ckpt}": lambda: script(ckpt)}
    speeds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            speeds[name].append(way())
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, speed in medians.items():
        print(f"{name}: {speed:,.0f} tokens/s, {speed / next(iter(medians.values())):.2f} times the loop")


def main(what="models", path=None, dense=None, ckpt=None):
    from model import pick_device

    arguments = {"models": 0, "layer": 0, "tokenize": 1, "score": 3}
    if arguments.get(what) != sum(argument is not None for argument in (path, dense, ckpt)):
        raise UsageError("bench.py takes models, layer, tokenize and a .jsonl, or score, a text, a dense model and another")
    parse_shapes(shapes)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    if what == "tokenize":
        bench_tokenize(path)
    elif what == "score":
        bench_score(path, dense, ckpt, pick_device(device))
    else:
        {"models": bench_models, "layer": bench_layer}[what](pick_device(device))


if __name__ == "__main__":
    run(main)
