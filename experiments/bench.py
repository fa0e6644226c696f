"""Speed and memory of KronyGPT against the dense model and against a torch.kron loop.

    python -m experiments.bench                     # training, forward, generation, memory, file size
    python -m experiments.bench --device=cuda --dtype=bfloat16
    python -m experiments.bench --n_layer=2 --n_embd=256 --n_head=4 --vocab_size=256 --shapes=256,256,1

Models have GPT-2's sizes and random weights; the shapes are those of the MLPs, and a fourth number is the rank of attention
matrices: with 768,1,288,288 the whole model has 82M parameters, as with 768,768,1. Candidates run in turns in one process,
after a warm-up, and the median of each is reported. Read the ratios, not the seconds: above 1 is faster (smaller) than the
dense model. It writes table.md and results.json to out_dir.
"""
import ctypes
import io
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
from kronygpt.configurator import run
from kronygpt.device import autocast_to, pick_device
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
device = ""  # cuda, cpu, ...; default: CUDA if available
dtype = "float32"  # or bfloat16 or float16, by autocast
out_dir = "out/bench"  # directory of the results

CONTEXTS, SEQUENCES = (64, 900), (1, 8)  # of generation: tokens at the end, and sequences at once
LOOP_FACTORS = 16  # at most, of a torch.kron loop: it keeps as many whole matrices for the backward pass

# A torch.nn.Module with its calls loss(idx, targets) and generate(idx, n) or None, for idx and targets (B, T)
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
    """Bytes that a call allocates at its peak, on top of those before it; None on systems that do not tell."""
    if torch_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def read(field):
        return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])

    try:
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system: it would hide allocations of the call
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # restart the peak
        before = read("VmRSS")
    except (AttributeError, OSError):  # another system, another C library than glibc, or a container that forbids it
        return None
    function()
    return read("VmHWM") - before


def make_candidates(shape, is_first):
    """{name: Candidate} to measure in turns: the dense model, ours, and a torch.kron loop unless it has many factors; with
    the first shape also transformers' GPT-2, and ours with its loss from whole logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def loss_of_whole_logits(logits_of, idx, targets):
        return F.cross_entropy(logits_of(idx).flatten(0, 1).float(), targets.flatten())

    def multiply_by_kron_loop(matrix, x):
        return x @ sum(torch.kron(a, b) for a, b in zip(matrix.A, matrix.B)) + matrix.bias

    def ours(shape, whole_logits=False):
        model = KronyGPT(make_config(shape))
        return Candidate(model, partial(loss_of_whole_logits, model) if whole_logits else model,
                         lambda idx, n: list(model.generate(idx, n, temperature=0)))

    candidates = {"dense": ours((n_embd, 4 * n_embd, 1)), f"ours {shape}": ours(shape)}
    if max(shape[2:]) <= LOOP_FACTORS:
        loop = ours(shape, whole_logits=True)
        for _, _, matrix in loop.model.matrices():
            if not matrix.is_dense:
                matrix.forward = partial(multiply_by_kron_loop, matrix)
        candidates[f"torch.kron {shape}"] = loop._replace(generate=None)
    if is_first:
        gpt2 = GPT2LMHeadModel(GPT2Config(
            n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size, vocab_size=vocab_size, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None))  # no token ends a text early
        candidates["transformers dense"] = Candidate(
            gpt2, partial(loss_of_whole_logits, lambda idx: gpt2(idx).logits),
            lambda idx, n: gpt2.generate(idx, do_sample=False, max_new_tokens=n))
        candidates[f"whole logits {shape}"] = ours(shape, whole_logits=True)
    return candidates


def measure(candidates, torch_device):
    """Measure candidates in turns: {name: {measurement: seconds, or bytes}}."""
    idx = torch.randint(vocab_size, (max(batch_size, memory_batch_size), block_size + 1),
                        generator=torch.Generator().manual_seed(0)).to(torch_device)
    results = {name: {} for name in candidates}

    def step(name, n, is_training):
        with torch.set_grad_enabled(is_training), autocast_to(torch_device, dtype):
            loss = candidates[name].loss(idx[:n, :-1], idx[:n, 1:])
        if is_training:
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

    def generate(name, sequences, context):
        with autocast_to(torch_device, dtype):
            candidates[name].generate(idx[:1, :context - new_tokens].repeat(sequences, 1), new_tokens)

    def record(what, values):
        for name, value in values.items():
            results[name][what] = value
        unit, size = ("GB", 1e9) if what == "peak memory" else ("s", 1)
        print(f"  {what}: " + ", ".join(f"{name} {value / size:.3g} {unit}" for name, value in values.items()), flush=True)

    optimizers = {name: torch.optim.AdamW(c.model.to(torch_device).parameters(), fused=True)
                  for name, c in candidates.items()}
    record("training step", time_in_turns(partial(step, n=batch_size, is_training=True), candidates))
    peaks = {name: peak_memory(partial(step, name, memory_batch_size, True), torch_device) for name in candidates}
    record("peak memory", {name: peak for name, peak in peaks.items() if peak is not None})
    optimizers.clear()
    record("forward", time_in_turns(partial(step, n=batch_size, is_training=False), candidates))
    for sequences, context in itertools.product(SEQUENCES, sorted({min(context, block_size) for context in CONTEXTS})):
        names = [name for name, candidate in candidates.items() if candidate.generate]
        record(f"generation {sequences} × {context}",
               time_in_turns(partial(generate, sequences=sequences, context=context), names))
    for name, candidate in candidates.items():
        file = io.BytesIO()
        torch.save(candidate.model.state_dict(), file)
        results[name]["file"] = file.tell()
    return results


def main():
    output_directory(out_dir)
    measured_shapes, torch_device = [tuple(map(int, shape.split(","))) for shape in shapes.split()], pick_device(device)
    for shape in measured_shapes:
        make_config(shape)  # which says now what is wrong with it
    results = {}
    for shape in measured_shapes:
        candidates = make_candidates(shape, is_first=not results)
        print(", ".join(candidates))
        for name, measured in (measurements := measure(candidates, torch_device)).items():
            ratios = {what: measurements["dense"][what] / value for what, value in measured.items() if value}
            results.setdefault(name, dict(measured=measured, faster_than_dense=ratios))
        del candidates  # before the next ones are made
    columns = list(results["dense"]["measured"])
    rows = [(name, *(f"{result['faster_than_dense'][column]:.2f} ×" if column in result["faster_than_dense"] else ""
                     for column in columns)) for name, result in results.items()]
    table = markdown(["model", *columns], rows)
    for name, content in (("table.md", table), ("results.json", json.dumps(results, indent=2))):
        with atomic_write(Path(out_dir, name), "w") as file:
            file.write(content + "\n")
    print("\ntimes and sizes of the dense model over those of each (above 1: faster, smaller)", table, sep="\n")


if __name__ == "__main__":
    run(main)
