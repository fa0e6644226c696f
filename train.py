"""Train a KronyGPT, from scratch or from a compressed GPT-2.

    python train.py config/train_gpt2.py                                  # on one GPU, or on the CPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py      # on eight GPUs
    torchrun --nnodes=2 --node_rank=0 --master_addr=... --nproc_per_node=8 train.py ...     # on two nodes
    python train.py config/train_gpt2.py --init_from=resume               # continue a run
    python train.py config/train_gpt2.py --teacher=gpt2                   # distillation from GPT-2

Writes ckpt.pt (the latest), best.pt (lowest validation loss), log.jsonl and, when it ends, loss.png to out_dir. Ctrl-C,
SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or SIGXCPU finishes the step, saves, and exits with 128 plus the number of the signal; a
second one exits at once. A resumed run ends with the weights of an uninterrupted one. On a CPU that other programs use, too,
OMP_NUM_THREADS=1 in the environment is often faster.
"""
import math
import signal
import time
from contextlib import nullcontext
from datetime import timedelta

import torch
from torch.nn.parallel import DistributedDataParallel

from kronygpt import checkpoint, configurator
from kronygpt.calibration import STATISTICS_TOKENS, statistics
from kronygpt.configurator import UserError, check_choice, handle_signals, option_types, run
from kronygpt.data import (
    batch_starts,
    calibration_text,
    data_tokenizer,
    even_starts,
    load_meta,
    load_tokens,
    score,
    step_seed,
    windows,
)
from kronygpt.device import Processes, autocast_to, default_dtype
from kronygpt.distillation import Distillation
from kronygpt.narrow import root
from kronygpt.run_dir import RunDir
from kronygpt.tokenizer import is_same, tokenizer_name
from model import KronyGPT, KronyGPTConfig, mlp_shapes

# the run
out_dir = "out"  # directory of the checkpoints and the log
init_from = "scratch"  # scratch, resume, a checkpoint, a Hugging Face directory or a hub name
dataset = "openwebtext"  # a directory under data/
seed = 1337  # seed for initialization, batches and dropout
max_iters = 5000  # optimizer steps
overwrite = False  # start over if out_dir already holds a run
eval_interval = 500  # steps between evaluations, which also save
checkpoint_minutes = 0.0  # also save every N minutes; 0 for never
keep = 0  # keep the checkpoints of the last N evaluations, as ckpt_{step}.pt
eval_iters = 50  # batches of each split in an evaluation
log_interval = 10  # steps between lines of progress
# the model from scratch; a checkpoint has its own sizes
block_size: int | None = None  # context; default: the checkpoint's, or 1024 from scratch
n_layer = 12  # number of blocks
n_head = 12  # number of attention heads
n_embd = 768  # width
dim_1: int | None = None  # rows of A in c_fc; default: n_embd (dense)
dim_2: int | None = None  # columns of A in c_fc; default: 4 n_embd (dense)
factors = "1"  # Kronecker products in a sum: one number, or a comma list with one per block
dropout = 0.0  # probability of dropout in embeddings, attention and residuals
# a step
batch_size = 12  # sequences in a micro-step
gradient_accumulation_steps = 40  # micro-steps in a step, divided among the processes
learning_rate = 6e-4  # the peak
factor_lr_scale = 1.0  # multiplies the learning rate of the Kronecker factors
factors_only = False  # train the Kronecker factors and freeze the rest
weight_decay = 0.1  # weight decay of matrices and factors
beta1 = 0.9  # AdamW's decay of the mean gradient
beta2 = 0.95  # AdamW's decay of the mean squared gradient
grad_clip = 1.0  # largest norm of the gradient; 0 for none
decay_lr = True  # decay after the warm-up; False keeps the rate constant
decay = "cosine"  # cosine or linear
warmup_iters = 200  # steps of linear warm-up
lr_decay_iters: int | None = None  # step at which min_lr is reached; default: max_iters
min_lr: float | None = None  # the lowest rate; default: learning_rate / 10, with linear decay 0
# distillation
teacher: str | None = None  # a checkpoint, a Hugging Face directory or a hub name; default: no distillation
distill = 0.5  # weight of the divergence from the teacher in the loss; the cross entropy has 1 - distill
temperature = 1.0  # divides the logits of both models in the divergence
features = 0.0  # weight of the residual streams' distance from the teacher's; 4 was best, at twice the learning rate
# the machine
device = ""  # cuda, mps, cpu, ...; default: CUDA if available, else Apple's mps, else the CPU
dtype = ""  # float32, bfloat16 or float16; default on CUDA: bfloat16 if the GPU has it, else float16; elsewhere float32
compile = False  # torch.compile the model
recompute = False  # compute the MLPs' activations again in backward: less memory, more time
# wandb
wandb_mode = "off"  # off, online or offline; WANDB_MODE in the environment overrides online and offline
wandb_project = "kronygpt"  # project of the run
wandb_run_name: str | None = None  # default: the name of out_dir

SIZES = ("n_layer", "n_head", "n_embd", "dim_1", "dim_2", "factors")  # options that a loaded model decides
MOST_SKIPPED = 32  # steps in a row whose gradients may overflow in float16, each of which halves the scale
OUT_OF_MEMORY = "lower --batch_size and raise --gradient_accumulation_steps by as much, or give --recompute=True"


def learning_rate_at(step):
    """Linear warm-up, then decay from learning_rate to min_lr, or a constant rate."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    share = min(1.0, (step - warmup_iters) / max(1, (lr_decay_iters or max_iters) - warmup_iters))
    if decay == "linear":
        return learning_rate + ((min_lr or 0.0) - learning_rate) * share
    lowest = learning_rate / 10 if min_lr is None else min_lr
    return lowest + (learning_rate - lowest) * (1 + math.cos(math.pi * share)) / 2


def main():
    # the machine, the model, the data and the optimizer
    is_resume, run_dir = init_from == "resume", RunDir(out_dir)
    run_dir.check(is_resume, overwrite)
    processes = Processes(device)
    rank, world_size, torch_device = processes.rank, processes.world_size, processes.device
    check_options(world_size)
    dtype_name = dtype or default_dtype(torch_device)
    autocast = autocast_to(torch_device, dtype_name)
    model, rest, init_options = make_model(run_dir)
    context, vocab_size = block_size or model.config.block_size, model.config.vocab_size
    tokens = {split: load_tokens(dataset, split, model.config, context) for split in ("train", "val")}
    model.to(torch_device)
    optimizer = model.configure_optimizers(learning_rate, weight_decay, (beta1, beta2), factor_lr_scale)
    if is_resume:
        checkpoint.load_optimizer_state(optimizer, rest["optimizer"], run_dir.last)
    scaler = torch.amp.GradScaler(torch_device.type, enabled=dtype_name == "float16")
    if rest.get("scaler"):
        scaler.load_state_dict(rest["scaler"])
    ddp_model = wrap(model, torch_device, world_size)
    micro_steps = gradient_accumulation_steps // world_size
    tokens_per_step = batch_size * gradient_accumulation_steps * context
    step, saved = rest.get("iter_num", 0), rest.get("config", {})

    options = {name: globals()[name] for name in option_types(globals())}
    options |= dict(init_from=saved.get("init_from", init_from), init_options=init_options)
    if processes.is_main:
        run_dir.start_wandb(options, saved.get("wandb_run_id"))
        run_dir.claim(overwrite, rest)
        print_plan(model, len(tokens["train"]), tokens_per_step)
        for name, value in saved.items():
            if name != "overwrite" and value != options.get(name, value):
                print(f"resumed with --{name}={options[name]}, where it was {value}")

    handle_signals(processes.on_signal)
    skipped = torch.zeros((), device=torch_device)
    most_skipped = MOST_SKIPPED if scaler.is_enabled() else 0
    saved_at = timed_from = time.perf_counter()
    first_timed = step
    while True:  # `step` counts the optimizer steps done
        # evaluate, save, stop; a resume repeats the evaluation of its step
        stop, losses = processes.stop_signal(), {}
        is_due = step % eval_interval == 0 or step >= max_iters
        if is_due and not stop:
            losses = evaluate(model, tokens, context, autocast, processes)
            stop = processes.stop_signal()
        is_late = processes.is_main and 0 < 60 * checkpoint_minutes < time.perf_counter() - saved_at
        if is_due or stop or is_late:
            is_finite = math.isfinite(sum(losses.values())) and all(p.isfinite().all() for p in model.parameters())
            check_finite(is_finite and skipped <= most_skipped, step, run_dir)
            if processes.is_main:
                run_dir.save(step, model, losses, options, optimizer=optimizer, scaler=scaler)
            if processes.is_main and losses:
                print(f"step {step:>6} | train loss {losses['train_loss']:.4f} | val loss {losses['val_loss']:.4f}")
            saved_at = timed_from = time.perf_counter()
            first_timed = step
        if stop or step >= max_iters:
            break

        # one step
        rate = learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        torch.manual_seed(step_seed(seed, step, rank))  # for dropout: a resumed run has the same masks
        starts = batch_starts(len(tokens["train"]), context, seed, step, batch_size * gradient_accumulation_steps)
        total = torch.zeros((), device=torch_device)
        for micro_step in range(micro_steps):
            begin = (micro_step * world_size + rank) * batch_size
            x, y = windows(tokens["train"], starts[begin:begin + batch_size], context, vocab_size, torch_device)
            with ddp_model.no_sync() if world_size > 1 and micro_step < micro_steps - 1 else nullcontext():  # reduce once
                with autocast:
                    loss = ddp_model(x, y) / micro_steps
                scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip if grad_clip > 0 else math.inf)
        # steps in a row that are not finite; read now and then, since reading waits for the GPU
        skipped = torch.where(total.isfinite() & grad_norm.isfinite(), 0, skipped + 1)
        scaler.step(optimizer)  # in float16, nothing where a gradient is not finite
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # a line of progress
        if step % log_interval == 0 or step % eval_interval == 0 or step == max_iters:
            check_finite(skipped <= most_skipped, step, run_dir)
            loss, norm = processes.mean(total, 1), grad_norm.item()
            if processes.is_main:
                now = time.perf_counter()
                seconds = (now - timed_from) / (step - first_timed)
                timed_from, first_timed = now, step
                speed, left = tokens_per_step / seconds, timedelta(seconds=round((max_iters - step) * seconds))
                tflops = speed * model.flops_per_token(context) / 1e12  # of all devices
                print(f"step {step:>6}/{max_iters} | loss {loss:.4f} | lr {rate:.2e} | norm {norm:.2f} | "
                      f"{speed:,.0f} tokens/s | {tflops:.3g} TFLOP/s | {left} left")
                run_dir.log(step=step, loss=loss, lr=rate, grad_norm=norm if norm < math.inf else None,  # no inf in JSON
                            tokens_per_second=speed, tflops=tflops)

    if processes.is_main:
        print(f"stopped by {signal.Signals(stop).name} after step {step}; --init_from=resume continues" if stop else
              f"done: best validation loss {run_dir.best_val_loss:.4f}, in {run_dir.best}")
        run_dir.close()
    processes.leave(stop)


def check_options(world_size):
    """Raise UserError where an option would go wrong without a word."""
    check_choice(globals(), "decay", "cosine", "linear")
    if not 0 <= distill <= 1:
        raise UserError(f"--distill is a share of the loss, from 0 to 1, not {distill}")
    if features and not teacher:
        raise UserError("--features compares with a --teacher, and there is none")
    if eval_iters < 1:  # the mean of no losses is not finite
        raise UserError(f"--eval_iters is at least 1, not {eval_iters}; a larger --eval_interval evaluates less often")
    if gradient_accumulation_steps % world_size:
        raise UserError(f"--gradient_accumulation_steps={gradient_accumulation_steps} cannot be divided evenly among "
                        f"{world_size} processes")


def make_model(run_dir):
    """The model that init_from names; for a resume, what else its checkpoint holds; the options that made what it was
    first loaded from."""
    rest, init_options = {}, {}
    if init_from == "scratch":
        torch.manual_seed(seed)
        numbers = [int(r) for r in factors.split(",")]
        model = KronyGPT(KronyGPTConfig(
            block_size=block_size or 1024, vocab_size=load_meta(dataset)["vocab_size"], n_layer=n_layer, n_head=n_head,
            n_embd=n_embd, dropout=dropout, tokenizer=data_tokenizer(dataset), shapes=mlp_shapes(
                dim_1 or n_embd, dim_2 or 4 * n_embd, numbers * n_layer if len(numbers) == 1 else numbers)))
    elif init_from == "resume":
        model, rest = checkpoint.load(run_dir.last, dropout)
        init_options = rest["config"].get("init_options", {})
        adopt_sizes(rest["config"])
    else:
        model, made = checkpoint.load(init_from, dropout)
        init_options = made["config"]
        adopt_sizes({})
    if (block_size or 1) > model.config.block_size:
        raise UserError(f"--block_size={block_size} is more than the model's context of {model.config.block_size}")
    model.config.recompute = recompute
    if factors_only:
        model.freeze_all_but_factors()
    return model, rest, init_options


def adopt_sizes(saved):
    """Set the sizes to those in the options of a run that is resumed, else to None; UserError where another one is given."""
    for name in SIZES:
        if name in configurator.given and globals()[name] != saved.get(name):
            raise UserError(f"--{name}={globals()[name]}: the model of --init_from={init_from} decides its sizes; omit it")
        globals()[name] = saved.get(name)


def wrap(model, torch_device, world_size):
    """The module that computes the loss of a batch: with a teacher, compiled, on several processes, as the options say."""
    if teacher:
        teacher_model, _ = checkpoint.load(teacher, as_stored=True)
        theirs, ours = [(config.vocab_size, tokenizer_name(config)) for config in (teacher_model.config, model.config)]
        if theirs[0] != ours[0] or not is_same(theirs[1], ours[1]):
            raise UserError(f"--teacher={teacher} has a vocabulary of {theirs[0]}, of {theirs[1]} tokens, and the model one "
                            f"of {ours[0]}, of {ours[1]} tokens")
        if features and (teacher_model.config.n_layer, teacher_model.config.n_embd) != (
                model.config.n_layer, model.config.n_embd):
            raise UserError(f"--features needs a teacher of as many blocks and of the same width, unlike {teacher}")
        teacher_model, roots = teacher_model.to(torch_device), None
        if features:
            text = calibration_text(dataset, STATISTICS_TOKENS, teacher_model.config, torch_device)
            fisher = statistics(teacher_model, text).fisher
            roots = torch.stack([root(fisher[f"transformer.h.{layer}.mlp.c_proj"]) for layer in range(model.config.n_layer)])
            roots = roots.float().to(torch_device)
        model = Distillation(model, teacher_model, distill, temperature, features, roots)
    if compile:
        model = torch.compile(model)
    return DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model


def print_plan(model, n_tokens, tokens_per_step):
    """Print what will be trained on how much."""
    counts = model.count_parameters()
    print(f"parameters: {counts['total']:,} = Kronecker factors {counts['factors']:,} + other matrices "
          f"{counts['matrices']:,} + biases and layer norms {counts['vectors']:,}")
    print(f"seed: {seed}; data: {dataset}, {n_tokens:,} tokens; a step takes {tokens_per_step:,}, the run "
          f"{tokens_per_step * max_iters / n_tokens:.2f} times the data")


def evaluate(model, tokens, context, autocast, processes):
    """{"train_loss", "val_loss"}: mean losses over windows spread evenly over each split, the same ones every time, for any
    number of processes; {} where a signal stops it."""
    losses, rank, world_size = {}, processes.rank, processes.world_size
    model.eval()
    for split, split_tokens in tokens.items():
        starts = even_starts(len(split_tokens), context, eval_iters * batch_size)
        own = [(start, start + 1, start + context + 1) for start in starts[rank::world_size]]
        scores, scored = score(model, split_tokens, own, batch_size), (0.0, 0)
        for _ in range(0, len(starts), world_size * batch_size):  # as many batches in each process
            with torch.no_grad(), autocast:
                scored = next(scores, scored)
            if processes.stop_signal():
                return {}
        losses[f"{split}_loss"] = processes.mean(*scored)
    model.train()
    return losses


def check_finite(is_finite, step, run_dir):
    """Raise UserError where a loss, a gradient or a weight is not finite, before the last good checkpoint is replaced."""
    if not is_finite:
        kept = f"{run_dir.last} is the last good checkpoint" if run_dir.last.exists() else "no checkpoint was written yet"
        raise UserError(f"the loss, the gradient or a weight is not finite after step {step} at learning rate "
                        f"{learning_rate_at(step - 1):.2e}; {kept}: try a lower rate, --grad_clip or --dtype=float32",
                        status=1)


if __name__ == "__main__":
    run(main)
