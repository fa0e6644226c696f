"""Speed and memory of KronyGPT against the dense model and transformers.

    python -m experiments.bench                     # training, forward, generation, memory, file size
    python -m experiments.bench --device=cuda --dtype=bfloat16
    python -m experiments.bench --models=checkpoints/best_82M.pt --shapes=768,1,288,288     # and this model, in turns
    python -m experiments.bench --n_layer=2 --n_embd=256 --n_head=4 --vocab_size=256 --shapes=256,256,1

Models have GPT-2's sizes and random weights; the shapes are those of the MLPs, and a fourth number is the rank of attention
matrices: with 768,1,288,288 the whole model has 82M parameters, as with 768,768,1. Candidates run in turns in one process,
after a warm-up, and the median of each is reported. Read the ratios, not the seconds: above 1 is faster (smaller) than the
dense model. It writes table.md and results.json to out_dir.
"""
import itertools
import json
import re
import statistics
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from experiments.compare import markdown
from kronygpt import checkpoint
from kronygpt.configurator import run
from kronygpt.device import autocast_to, glibc, pick_device
from kronygpt.files import atomic_write, output_directory
from model import KronyGPT, KronyGPTConfig, Shape, mlp_shapes

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
models = ""  # comma list of compressed models of these sizes, which are measured beside the first shape
device = ""  # cuda, mps, cpu, ...; default: CUDA if available, else Apple's mps, else the CPU
dtype = "float32"  # or bfloat16 or float16, by autocast; in generation that of the weights
compile = False  # torch.compile the models, but for generation
out_dir = "out/bench"  # directory of the results

CONTEXTS, SEQUENCES = (64, 900), (1, 8, 64)  # of generation: tokens at the end, and sequences at once; 64 on GPUs

# A torch.nn.Module with its calls loss(idx, targets) and generate(idx, n), for idx and targets (B, T)
Candidate = namedtuple("Candidate", "model loss generate")


def make_config(shape):
    """The KronyGPTConfig of a model with a shape (dim_1, dim_2, factors), and perhaps attention's rank."""
    dim_1, dim_2, factors, *ranks = shape
    attention = {f"attn.{name}": [Shape(n_embd, 1, rank)] * n_layer for rank in ranks for name in ("c_attn", "c_proj")}
    return KronyGPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                          shapes=mlp_shapes(dim_1, dim_2, [factors] * n_layer) | attention)


def time_in_turns(function, names):
    """{name: median seconds of function(name)} in turns, after a warm-up."""
    def clock():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = {name: [] for name in names}
    for _ in range(1 + repeats):
        for name in names:
            start = clock()
            function(name)
            seconds[name].append(clock() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def peak_memory(function, torch_device):
    """Bytes that a call allocates at its peak, on top of those before it: on a GPU or on Linux."""
    if torch_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def read(field):
        return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])

    glibc("malloc_trim", 0)  # return freed memory to the system: it would hide allocations of the call
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # restart the peak
    before = read("VmRSS")
    function()
    return max(4096, read("VmHWM") - before)  # a page at least


def make_candidates(shape, is_first):
    """{name: Candidate} to measure in turns: the dense model and ours; with the first shape also transformers' GPT-2, ours
    with its loss from whole logits, and the option's models."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def loss_of_whole_logits(logits_of, idx, targets):
        return F.cross_entropy(logits_of(idx).flatten(0, 1).float(), targets.flatten())

    def ours(shape):
        model = KronyGPT(make_config(shape))
        return Candidate(model, model, partial(generate, model))

    def generate(model, idx, n):  # the last measurement: the weights stay so
        list(model.to(getattr(torch, dtype)).generate(idx, n, temperature=0))

    def loaded(path):  # balanced for training, and as stored for all else
        model, stored = (checkpoint.load(path, as_stored=as_stored)[0] for as_stored in (False, True))
        stored.to(pick_device(device))
        return Candidate(model, lambda *batch: (model if torch.is_grad_enabled() else stored)(*batch),
                         partial(generate, stored))

    candidates = {"dense": ours((n_embd, 4 * n_embd, 1)), f"ours {shape}": ours(shape)}
    if is_first:
        gpt2 = GPT2LMHeadModel(GPT2Config(
            n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size, vocab_size=vocab_size, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None))  # no token ends a text early
        candidates["transformers dense"] = Candidate(
            gpt2, partial(loss_of_whole_logits, lambda idx: gpt2(idx).logits),
            lambda idx, n: gpt2.to(getattr(torch, dtype)).generate(idx, do_sample=False, max_new_tokens=n))
        whole = ours(shape)
        candidates[f"whole logits {shape}"] = whole._replace(loss=partial(loss_of_whole_logits, whole.model))
        candidates |= {path: loaded(path) for path in models.split(",") if path}
    return candidates


def measure(candidates, torch_device):
    """Measure candidates in turns: {name: {measurement: seconds, or bytes}}."""
    idx = torch.randint(vocab_size, (max(batch_size, memory_batch_size), block_size + 1),
                        generator=torch.Generator().manual_seed(0)).to(torch_device)
    torch.compiler.reset()  # it compiles a function a few times only
    results = {name: {} for name in candidates}
    losses = {name: torch.compile(c.loss) if compile else c.loss for name, c in candidates.items()}

    def step(name, n, is_training):
        with torch.set_grad_enabled(is_training), autocast_to(torch_device, dtype):
            loss = losses[name](idx[:n, :-1], idx[:n, 1:])
        if is_training:
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

    def generate(name, sequences, context):
        candidates[name].generate(idx[:1, :context - new_tokens].repeat(sequences, 1), new_tokens)

    def record(what, values):
        for name, value in values.items():
            results[name][what] = value
        unit, size = ("GB", 1e9) if what in ("peak memory", "file") else ("s", 1)
        print(f"  {what}: " + ", ".join(f"{name} {value / size:.3g} {unit}" for name, value in values.items()), flush=True)

    optimizers = {name: torch.optim.AdamW(c.model.to(torch_device).parameters(), fused=True)
                  for name, c in candidates.items()}
    record("training step", time_in_turns(partial(step, n=batch_size, is_training=True), candidates))
    if torch_device.type == "cuda" or Path("/proc/self/clear_refs").exists():
        record("peak memory", {name: peak_memory(partial(step, name, memory_batch_size, True), torch_device)
                               for name in candidates})
    optimizers.clear()
    record("forward", time_in_turns(partial(step, n=batch_size, is_training=False), candidates))
    contexts = sorted({min(context, block_size) for context in CONTEXTS})
    for sequences, context in itertools.product(SEQUENCES[:None if torch_device.type == "cuda" else -1], contexts):
        record(f"generation {sequences} × {context}",
               time_in_turns(partial(generate, sequences=sequences, context=context), candidates))
    record("file", {name: 4 * (c.model.count_parameters()["total"] if isinstance(c.model, KronyGPT) else
                               sum(p.numel() for p in c.model.parameters())) for name, c in candidates.items()})
    return results


def main():
    output_directory(out_dir)
    torch_device, results = pick_device(device), {}
    for shape in [tuple(map(int, shape.split(","))) for shape in shapes.split()]:
        measurements = measure(make_candidates(shape, is_first=not results), torch_device)
        for name, measured in measurements.items():
            ratios = {what: measurements["dense"][what] / value for what, value in measured.items()}
            results.setdefault(name, dict(measured=measured, faster_than_dense=ratios))
    columns = list(results["dense"]["measured"])
    rows = [(name, *(f"{result['faster_than_dense'][column]:.2f} ×" for column in columns))
            for name, result in results.items()]
    table = markdown(["model", *columns], rows)
    for name, content in (("table.md", table), ("results.json", json.dumps(results, indent=2))):
        with atomic_write(Path(out_dir, name), "w") as file:
            file.write(content + "\n")
    print("\ntimes and sizes of the dense model over those of each (above 1: faster, smaller)", table, sep="\n")


if __name__ == "__main__":
    run(main)
