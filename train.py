"""Train a KronyGPT, from scratch or from a compressed GPT-2.

    python train.py config/train_gpt2.py                                  # on one GPU, or on the CPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py      # on eight GPUs
    torchrun --nnodes=2 --node_rank=0 --master_addr=... --nproc_per_node=8 train.py ...     # on two nodes
    python train.py config/train_gpt2.py --init_from=resume               # continue a run
    python train.py config/train_gpt2.py --teacher=gpt2                   # distillation from GPT-2

Writes ckpt.pt (the latest), best.pt (lowest validation loss), log.jsonl and, when it ends, loss.png to out_dir. Ctrl-C or
SIGTERM finishes the step and saves; a second one exits at once. A resumed run ends with the weights of an uninterrupted one.
"""
import math
import os
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from kronygpt import configurator
from kronygpt.configurator import UserError, check_choice, check_range, option_types, run, shortened

# the run
out_dir = "out"  # directory of the checkpoints and the log
init_from = "scratch"  # scratch, resume, a checkpoint, a Hugging Face directory or a hub name
dataset = "openwebtext"  # a directory under data/
seed = 1337  # of the initialisation, the batches and dropout
max_iters = 5000  # optimizer steps
overwrite = False  # start over if out_dir already holds a run
eval_interval = 500  # steps between evaluations, which also save
checkpoint_minutes = 0.0  # also save every N minutes; 0 for never
keep = 0  # number of older checkpoints to keep beside ckpt.pt, as ckpt_{step}.pt
eval_iters = 50  # batches of each split in an evaluation
log_interval = 10  # steps between lines of progress
# the model from scratch; a checkpoint has its own sizes
block_size: int | None = None  # context; default: the checkpoint's, or 1024 from scratch
n_layer = 12  # blocks
n_head = 12  # attention heads
n_embd = 768  # width
dim_1: int | None = None  # rows of A in c_fc; default: n_embd (dense)
dim_2: int | None = None  # columns of A in c_fc; default: 4 n_embd (dense)
factors = "1"  # Kronecker products in a sum: one number, or a comma list with one per layer
dropout = 0.0  # in embeddings, attention and residuals
# a step
batch_size = 12  # sequences in a micro-step
gradient_accumulation_steps = 40  # micro-steps in a step, divided among the processes
learning_rate = 6e-4  # the peak
factor_lr_scale = 1.0  # multiplies the learning rate of the Kronecker factors
factors_only = False  # train the Kronecker factors and freeze the rest
weight_decay = 0.1  # of matrices and factors
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW
grad_clip = 1.0  # largest norm of the gradient; 0 for none
decay_lr = True  # decay after the warm-up; False keeps the rate constant
decay = "cosine"  # cosine or linear
warmup_iters = 200  # steps of linear warm-up
lr_decay_iters: int | None = None  # step at which min_lr is reached; default: max_iters
min_lr: float | None = None  # the lowest rate; default: learning_rate / 10, with linear decay 0
# distillation
teacher: str | None = None  # the teacher: a checkpoint, a Hugging Face directory or a hub name
distill = 0.5  # weight of the divergence from the teacher in the loss; 1 - distill is that of the cross entropy
temperature = 1.0  # divides the logits of both models in the divergence
# the machine
device = ""  # cuda, mps, cpu, ...; default: CUDA if available, else Apple's mps, else the CPU
dtype = ""  # float32, bfloat16 or float16; default on CUDA: bfloat16 if the GPU has it, else float16; elsewhere float32
compile = False  # torch.compile the model
recompute = False  # compute the MLPs' activations again in backward: less memory, more time
# wandb
wandb_mode = "off"  # off, online or offline; the latter two are overridden by WANDB_MODE in the environment
wandb_project = "kronygpt"  # the project of the run
wandb_run_name: str | None = None  # default: the name of out_dir

SIZES = ("n_layer", "n_head", "n_embd", "dim_1", "dim_2", "factors")  # options that a loaded model decides
RUN_BY_RUN = ("init_from", "overwrite")  # options that a resumed run need not share with the original
DEFAULT_CONTEXT = 1024  # tokens
FLOAT, HALF, INDEX = 4, 2, 8  # bytes of a float32, a float16 or bfloat16, and an int64
OUT_OF_MEMORY = "lower --batch_size and raise --gradient_accumulation_steps by as much, or give --recompute=True"
MOST_SKIPPED = 32  # steps in a row whose gradients may overflow in float16, each of which halves the scale


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


def check_options(world_size):
    check_range(globals(), "max_iters eval_interval eval_iters log_interval batch_size gradient_accumulation_steps "
                "block_size n_layer n_head n_embd dim_1 dim_2 lr_decay_iters", at_least=1)
    check_range(globals(), "seed learning_rate min_lr factor_lr_scale weight_decay grad_clip warmup_iters "
                "checkpoint_minutes keep", at_least=0)
    check_range(globals(), "beta1 beta2", at_least=0, below=1)
    check_range(globals(), "distill", at_least=0, at_most=1)
    check_range(globals(), "temperature", above=0)
    check_choice(globals(), "decay", "cosine", "linear")
    check_choice(globals(), "wandb_mode", "off", "online", "offline")
    if gradient_accumulation_steps % world_size:
        raise UserError(f"--gradient_accumulation_steps={gradient_accumulation_steps} cannot be divided evenly among "
                        f"{world_size} processes")


def factors_of_layers(layers):
    """The numbers that the option factors gives to so many layers."""
    try:
        numbers = [int(r) for r in factors.split(",")]
    except ValueError:
        raise UserError(f"--factors is a whole number or a comma list of them, not {shortened(factors)}") from None
    return numbers * layers if len(numbers) == 1 else numbers


def shapes_from_scratch(vocab_size):
    """The shapes of the MLPs that the options name, of a model that fits this machine's memory."""
    import torch

    from kronygpt.device import check_memory
    from model import mlp_shapes

    d1, d2 = dim_1 or n_embd, dim_2 or 4 * n_embd
    matrices = 4 * n_layer * n_embd**2 + (vocab_size + (block_size or DEFAULT_CONTEXT)) * n_embd
    check_memory(FLOAT * matrices, torch.device("cpu"), f"a model of {n_layer:,} blocks, {n_embd:,} wide")
    numbers = factors_of_layers(n_layer)
    mlps = 2 * sum(numbers) * (d1 * d2 + n_embd // d1 * (4 * n_embd // d2))
    check_memory(FLOAT * (matrices + mlps), torch.device("cpu"), f"a model with {sum(numbers):,} factors of ({d1}, {d2})")
    return mlp_shapes(d1, d2, numbers)


def adopt_sizes(model):
    """Set the options of the model's sizes to those of a model that was loaded; UserError where one that was given
    contradicts it."""
    config, c_fc = model.config, model.config.shapes["mlp.c_fc"]
    numbers = [shape.factors for shape in c_fc]
    if "factors" in configurator.given and factors_of_layers(len(c_fc)) == numbers:
        configurator.given.remove("factors")  # another way to say it

    def common(values):
        return values[0] if len(set(values)) == 1 else None

    sizes = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                 dim_1=common([shape.dim_1 for shape in c_fc]), dim_2=common([shape.dim_2 for shape in c_fc]),
                 factors=str(common(numbers) or ",".join(map(str, numbers))))
    for name, value in sizes.items():
        if name in configurator.given and globals()[name] != value:
            raise UserError(f"--{name}={globals()[name]} contradicts --init_from={init_from}: there it is {value}; omit it")
    globals().update(sizes)


def make_model(vocab_size):
    """The model that init_from names, the record of its tokenizer, and for a resume, what else its checkpoint holds."""
    import torch

    from kronygpt import checkpoint
    from kronygpt.data import data_tokenizer
    from model import KronyGPT, KronyGPTConfig

    if init_from == "scratch":
        torch.manual_seed(seed)
        model = KronyGPT(KronyGPTConfig(block_size=block_size or DEFAULT_CONTEXT, vocab_size=vocab_size, n_layer=n_layer,
                                        n_head=n_head, n_embd=n_embd, dropout=dropout,
                                        shapes=shapes_from_scratch(vocab_size), tokenizer=data_tokenizer(dataset)))
        rest = {}
    else:
        is_resume = init_from == "resume"
        load, source = (checkpoint.load_to_resume, Path(out_dir, "ckpt.pt")) if is_resume else (checkpoint.load, init_from)
        model, rest = load(source, dropout)
        adopt_sizes(model)
    if (block_size or 1) > model.config.block_size:
        raise UserError(f"--block_size={block_size} is more than the model's context of {model.config.block_size}")
    model.config.recompute = recompute
    if factors_only:
        model.freeze_all_but_factors()
    return model, rest if init_from == "resume" else {}


def wrap(model, context, processes):
    """The module that computes the loss of a batch: with a teacher, compiled, on several processes, as the options say."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from kronygpt import checkpoint
    from kronygpt.distillation import Distillation
    from kronygpt.tokenizer import is_same, tokenizer_name

    if teacher:
        teacher_model, _ = checkpoint.load(teacher)
        ours, theirs = model.config, teacher_model.config
        if theirs.vocab_size != ours.vocab_size or theirs.block_size < context:
            raise UserError(f"--teacher={teacher} has a vocabulary of {theirs.vocab_size} and a context of "
                            f"{theirs.block_size}, and the run needs {ours.vocab_size} and at least {context}")
        names = [tokenizer_name(config) for config in (theirs, ours)]
        if not is_same(*names):
            raise UserError(f"--teacher={teacher} has the tokenizer {names[0]}, and the model {names[1]}")
        model = Distillation(model, teacher_model.to(processes.device), distill, temperature)
    if compile:
        model = torch.compile(model)
    return DistributedDataParallel(model, broadcast_buffers=False) if processes.world_size > 1 else model


def print_plan(model, n_tokens, tokens_per_step, speed, resumed_options):
    """Print what will be trained on how much, what mfu means, and what differs from the run that is resumed."""
    counts = model.count_parameters()
    print(f"parameters: {counts['total']:,} = Kronecker factors {counts['factors']:,} + other matrices "
          f"{counts['matrices']:,} + biases and layer norms {counts['vectors']:,}")
    print(f"seed: {seed}; data: {dataset}, {n_tokens:,} tokens; a step takes {tokens_per_step:,}, the run "
          f"{tokens_per_step * max_iters / n_tokens:.2f} times the data; mfu is a share of {speed}")
    for name, value in resumed_options.items():
        if name in option_types(globals()) and name not in RUN_BY_RUN and name not in SIZES and value != globals()[name]:
            print(f"resumed with --{name}={globals()[name]}, where it was {value}")


def main():
    import torch

    from kronygpt import checkpoint
    from kronygpt.data import batch_starts, even_starts, load_meta, load_tokens, step_seed, windows
    from kronygpt.device import Processes, Speed, autocast_to, check_memory, default_dtype, gradient_scaler
    from kronygpt.run_dir import RunDir

    # processes and the machine
    check_options(int(os.environ.get("WORLD_SIZE", 1)))
    run_dir, is_resume = RunDir(out_dir), init_from == "resume"
    run_dir.check(is_resume, overwrite)
    processes = Processes(device)
    rank, world_size, torch_device = processes.rank, processes.world_size, processes.device
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32 on a GPU
    dtype_name = dtype or default_dtype(torch_device)
    autocast = autocast_to(torch_device, dtype_name)

    # data, model, optimizer
    model, rest = make_model(load_meta(dataset)["vocab_size"])
    context, vocab_size = block_size or model.config.block_size, model.config.vocab_size
    tokens = {split: load_tokens(dataset, split, model.config, context) for split in ("train", "val")}
    check_memory(HALF * batch_size * context * model.config.n_layer * model.config.n_embd, torch_device,
                 f"a micro-step of {batch_size:,} sequences")
    check_memory(INDEX * batch_size * max(eval_iters, gradient_accumulation_steps), torch.device("cpu"),
                 "the batch of a step or an evaluation")
    model.to(torch_device)
    optimizer = model.configure_optimizers(learning_rate, weight_decay, (beta1, beta2), factor_lr_scale)
    if is_resume:
        checkpoint.load_optimizer_state(optimizer, rest["optimizer"], run_dir.last)
    scaler = gradient_scaler(torch_device, dtype_name, rest.get("scaler"))
    ddp_model = wrap(model, context, processes)
    step = rest.get("iter_num", 0)
    best_val_loss = rest.get("best_val_loss", math.inf) if run_dir.best.exists() else math.inf
    micro_steps = gradient_accumulation_steps // world_size
    tokens_per_step = batch_size * gradient_accumulation_steps * context

    # logs and files are written by one process
    options = {name: globals()[name] for name in option_types(globals())}
    if processes.is_main:
        run_dir.start_wandb(options, rest.get("config", {}).get("wandb_run_id"))
        run_dir.claim(is_resume, overwrite)
        speed = Speed(torch_device, dtype_name, world_size, step)
        print_plan(model, len(tokens["train"]), tokens_per_step, speed, rest.get("config", {}))

    def fail(what, bad_step):
        kept = f"{run_dir.last} is the last good checkpoint" if run_dir.last.exists() else "no checkpoint was written yet"
        raise UserError(f"{what} not finite with step {bad_step} at learning rate {learning_rate_at(bad_step):.2e}, "
                        f"rank {rank}; {kept}: try a lower rate, --grad_clip or --dtype=float32", status=1)

    @torch.no_grad()
    def loss_at(split_tokens, starts):
        model.eval()
        with autocast:
            loss = model(*windows(split_tokens, starts, context, vocab_size, torch_device))
        model.train()
        return loss

    def evaluate(split):
        """Mean loss over windows spread evenly over a split: the same ones every time, for any number of processes. None
        where a signal stops it."""
        starts = even_starts(len(tokens[split]), context, eval_iters * batch_size)
        total = torch.zeros((), device=torch_device)
        for begin in range(0, len(starts), world_size * batch_size):
            rows = starts[begin:begin + world_size * batch_size][rank::world_size]
            if len(rows):
                total += loss_at(tokens[split], rows) * len(rows)
            if processes.must_stop():
                return None
        return processes.mean(total, len(starts) / world_size)

    def save(path, **states):
        if processes.is_main:
            checkpoint.save(path, model, iter_num=step, best_val_loss=best_val_loss, config=options, **states)

    def save_last(keep_as=None):
        nonlocal saved_step, saved_at
        if first_bad_step >= 0:
            fail("the loss or the gradient is", first_bad_step.item())
        if not all(p.isfinite().all() for p in model.parameters()):
            fail("the weights are", step - 1)
        if not loss_at(tokens["val"], [0]).isfinite():
            fail("the validation loss is", step - 1)
        save(run_dir.last, optimizer=optimizer, scaler=scaler, keep_as=keep_as)
        saved_step, saved_at = step, time.monotonic()

    def evaluate_and_save_best():
        nonlocal best_val_loss
        train_loss, val_loss = evaluate("train"), evaluate("val")
        if train_loss is None or val_loss is None:
            return
        if not math.isfinite(train_loss + val_loss):
            fail("the evaluation's loss is", step - 1)
        if processes.is_main:
            print(f"step {step:>6} | train loss {train_loss:.4f} | val loss {val_loss:.4f}")
            run_dir.log(step=step, train_loss=train_loss, val_loss=val_loss)
        if val_loss < best_val_loss:
            best_val_loss = val_loss
            save(run_dir.best)
        if processes.is_main:
            speed.restart(step)

    # the loop: `step` counts the optimizer steps done. A checkpoint is written before the evaluation of its step, which a
    # resume repeats
    processes.catch_signals()
    first_bad_step = torch.full((), -1, device=torch_device)  # on the device: reading it would wait for the step
    skipped = torch.zeros((), device=torch_device)  # steps in a row whose gradients are not finite
    saved_step, saved_at = step, time.monotonic()
    if not is_resume:
        save_last()
    if processes.is_main:
        run_dir.open_log(step, is_resume)
    if step % eval_interval == 0 or step >= max_iters:
        evaluate_and_save_best()
    stopping = processes.must_stop()
    while step < max_iters and not stopping:
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
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        skipped = torch.where(grad_norm.isfinite(), 0, skipped + 1)
        is_bad = ~total.isfinite() | (skipped > (MOST_SKIPPED if scaler.is_enabled() else 0))
        first_bad_step = torch.where(is_bad & (first_bad_step < 0), step, first_bad_step)
        scaler.step(optimizer)  # in float16, nothing where a gradient is not finite
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        stopping = processes.must_stop()
        is_evaluated = step % eval_interval == 0 or step == max_iters
        is_logged = step % log_interval == 0 or is_evaluated
        if is_logged or stopping:
            if first_bad_step >= 0:
                fail("the loss or the gradient is", first_bad_step.item())
            loss = processes.mean(total, 1)
            if processes.is_main:
                norm = grad_norm.item()
                tokens_per_second, mfu, seconds = speed.read(step, tokens_per_step, model.flops_per_token())
                left = timedelta(seconds=round((max_iters - step) * seconds))
                print(f"step {step:>6}/{max_iters} | loss {loss:.4f} | lr {rate:.2e} | norm {norm:.2f} | "
                      f"{tokens_per_second:,.0f} tokens/s | mfu {mfu:.0%} | {left} left")
                if is_logged:
                    run_dir.log(step=step, loss=loss, lr=rate, grad_norm=norm if norm < math.inf else None,  # no inf in JSON
                                tokens_per_second=tokens_per_second, mfu=mfu)
        is_due = checkpoint_minutes and processes.is_main and time.monotonic() - saved_at > 60 * checkpoint_minutes
        if is_evaluated or stopping or is_due:
            save_last(run_dir.name_to_keep(saved_step, keep) if processes.is_main else None)
            if processes.is_main:
                run_dir.remove_older(keep)
        if is_evaluated:
            evaluate_and_save_best()
            stopping = processes.must_stop()

    if not stopping:
        save_last()  # with the lowest validation loss of the whole run
    if processes.is_main:
        if stopping:
            print(f"stopped by {processes.stop_signal or 'another process'} after step {step}; --init_from=resume continues")
        else:
            print(f"done: best validation loss {best_val_loss:.4f}, in {run_dir.best}")
        run_dir.close()
    processes.leave()


if __name__ == "__main__":
    run(main)
