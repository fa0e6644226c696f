"""Train a KronyGPT, from scratch or from a compressed GPT-2.

    python train.py config/train_gpt2.py                                  # on one GPU, or on the CPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py      # on eight GPUs
    torchrun --nnodes=2 --node_rank=0 --master_addr=... --nproc_per_node=8 train.py ...     # on two nodes
    python train.py config/train_gpt2.py --init_from=resume               # where it stopped
    python train.py config/train_gpt2.py --teacher=gpt2                   # learn from GPT-2's predictions as well

Writes ckpt.pt (the latest), best.pt (the lowest validation loss) and log.jsonl to out_dir. Ctrl-C or SIGTERM finishes
the step, saves and exits; a second one exits at once. A run that was stopped or killed, at whatever moment, goes on with
--init_from=resume and ends with the weights that it would have had.
"""
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from configurator import UsageError, option_types, run
from files import lock, remove_leftovers, replacing

# the run
out_dir = "out"  # where checkpoints and the log go
init_from = "scratch"  # scratch, resume, a checkpoint, a Hugging Face directory or a hub name
dataset = "openwebtext"  # a directory under data/
seed = 1337  # of the initialisation, the batches and dropout
max_iters = 5000  # optimizer steps
overwrite = False  # start over where out_dir holds a run already
eval_interval = 500  # steps between evaluations, which also save
checkpoint_minutes = 0.0  # save when so many have passed since the last time, too; 0 for never
keep = 0  # older checkpoints that stay beside ckpt.pt, as ckpt_{step}.pt
eval_iters = 50  # batches of each split in an evaluation
log_interval = 10  # steps between lines of progress
# the model from scratch; a checkpoint brings its own shape
block_size: int | None = None  # context; without it the checkpoint's, or 1024 from scratch
n_layer = 12  # blocks
n_head = 12  # attention heads
n_embd = 768  # width
dim_1: int | None = None  # rows of A in c_fc; n_embd (dense) if left out
dim_2: int | None = None  # columns of A in c_fc; 4 n_embd (dense) if left out
factors = "1"  # Kronecker products in a sum: one number, or a comma list with one per layer
dropout = 0.0  # in embeddings, attention and residuals
# a step
batch_size = 12  # sequences in a micro-step
gradient_accumulation_steps = 40  # micro-steps in a step, shared out among the processes
learning_rate = 6e-4  # the highest
factor_lr_scale = 1.0  # times the learning rate, for the Kronecker factors
factors_only = False  # train the Kronecker factors and freeze the rest
weight_decay = 0.1  # of matrices and factors
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW
grad_clip = 1.0  # largest norm of the gradient; 0 for none
decay_lr = True  # cosine decay after the warm-up; False keeps the rate constant
warmup_iters = 200  # steps of linear warm-up
lr_decay_iters: int | None = None  # step at which the lowest rate is reached; max_iters if left out
min_lr: float | None = None  # the lowest rate; learning_rate / 10 if left out
# distillation
teacher: str | None = None  # a model to learn from as well: a checkpoint, a Hugging Face directory or a hub name
distill = 0.5  # share of the loss that is the divergence from the teacher
temperature = 1.0  # divides the logits of both in it
# the machine
device = ""  # cuda, cpu, ...: what there is if left out
dtype = ""  # float32 or bfloat16; bfloat16 on a GPU that has it, else float32, if left out
compile = False  # torch.compile the model
# wandb
wandb_mode = "off"  # off, online or offline
wandb_project = "kronygpt"  # where the run is listed
wandb_run_name: str | None = None  # the name of out_dir if left out


RUN_BY_RUN = ("init_from", "overwrite")  # options that a resumed run need not share with the one that it goes on with


class NotFiniteError(Exception):
    """The loss or the gradient is nan or infinite."""

    exit_status = 1


def learning_rate_at(step):
    """Linear warm-up, then cosine decay from learning_rate to min_lr, or a constant rate."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    lowest = learning_rate / 10 if min_lr is None else min_lr
    share = min(1.0, (step - warmup_iters) / max(1, (lr_decay_iters or max_iters) - warmup_iters))
    return lowest + (learning_rate - lowest) * (1 + math.cos(math.pi * share)) / 2


def check_options(world_size):
    for name in ("max_iters", "eval_interval", "eval_iters", "log_interval", "batch_size", "gradient_accumulation_steps"):
        if globals()[name] < 1:
            raise UsageError(f"--{name} is at least 1, not {globals()[name]}")
    for name in ("seed", "learning_rate", "factor_lr_scale", "weight_decay", "grad_clip", "warmup_iters",
                 "checkpoint_minutes", "keep"):
        if not 0 <= globals()[name] < math.inf:
            raise UsageError(f"--{name} is at least 0, not {globals()[name]}")
    for name in ("beta1", "beta2"):
        if not 0 <= globals()[name] < 1:
            raise UsageError(f"--{name} is at least 0 and below 1, not {globals()[name]}")
    if not 0 <= distill <= 1:
        raise UsageError(f"--distill is from 0 to 1, not {distill}")
    if not 0 < temperature < math.inf:
        raise UsageError(f"--temperature is above 0, not {temperature}")
    if block_size is not None and block_size < 1:
        raise UsageError(f"--block_size is at least 1, not {block_size}")
    if gradient_accumulation_steps % world_size:
        raise UsageError(f"--gradient_accumulation_steps={gradient_accumulation_steps} cannot be shared out evenly "
                         f"among {world_size} processes")
    if wandb_mode not in ("off", "online", "offline"):
        raise UsageError(f"--wandb_mode is off, online or offline, not {wandb_mode}")
    check_out_dir()


def check_out_dir():
    """Whether out_dir holds what a resume needs, and nothing that a new run would destroy."""
    last = Path(out_dir, "ckpt.pt")
    if Path(out_dir).exists() and not Path(out_dir).is_dir():
        raise UsageError(f"--out_dir={out_dir} is a file")
    if init_from == "resume":
        if not last.exists():
            raise UsageError(f"nothing to resume: no {last}")
    elif last.exists() and not overwrite:
        raise UsageError(f"{out_dir} holds a run already: --init_from=resume goes on with it, --overwrite=True starts over, "
                         "another --out_dir keeps it")


def make_model(vocab_size):
    """The model that init_from asks for, and the rest of its checkpoint."""
    import torch

    import checkpoint
    from model import KronyGPT, KronyGPTConfig

    if init_from == "scratch":
        torch.manual_seed(seed)
        try:
            per_layer = [int(r) for r in factors.split(",")]
        except ValueError:
            raise UsageError(f"--factors is a whole number or a comma list of them, not {factors}") from None
        config = KronyGPTConfig(block_size=block_size or 1024, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                                n_embd=n_embd, dropout=dropout, dim_1=dim_1, dim_2=dim_2,
                                factors=per_layer[0] if len(per_layer) == 1 else per_layer)
        return KronyGPT(config), {}
    model, rest = checkpoint.load(str(Path(out_dir, "ckpt.pt")) if init_from == "resume" else init_from, dropout)
    if (block_size or 1) > model.config.block_size:
        raise UsageError(f"--block_size={block_size} is more than the model's context of {model.config.block_size}")
    return model, rest if init_from == "resume" else {}


def load_teacher(config, context):
    """The model to learn from, whose tokens are those of a KronyGPTConfig."""
    import checkpoint

    source, _ = checkpoint.load(teacher)
    if source.config.vocab_size != config.vocab_size or source.config.block_size < context:
        raise UsageError(f"--teacher={teacher} has a vocabulary of {source.config.vocab_size} and a context of "
                         f"{source.config.block_size}, and the run needs {config.vocab_size} and at least {context}")
    return source.eval().requires_grad_(False)


def is_log_line(line):
    """Whether a line of log.jsonl is whole: a killed run may leave half of one."""
    try:
        return line.endswith("\n") and isinstance(json.loads(line)["step"], int)
    except (ValueError, KeyError, TypeError):
        return False


def open_log(first_step):
    """log.jsonl, open for appending, without the lines of steps that are about to be done again."""
    path = Path(out_dir, "log.jsonl")
    lines = path.read_text(errors="replace").splitlines(keepends=True) if first_step and path.exists() else []
    with replacing(path, "w") as file:
        file.writelines(line for line in lines if is_log_line(line) and json.loads(line)["step"] <= first_step)
    return path.open("a", buffering=1)


def claim_out_dir():
    """Lock out_dir for this run and clear it of half-written files, and where a run starts over, of the one before."""
    held = lock(out_dir)
    check_out_dir()  # again: another run may have ended here since the first time
    remove_leftovers(out_dir)
    if init_from != "resume":
        for path in (*Path(out_dir).glob("ckpt*.pt"), *Path(out_dir).glob("best.pt")):
            path.unlink()
    return held


def keep_older(last_step):
    """Give the checkpoint that ckpt.pt is about to replace a name of its own, and remove the oldest of those."""
    newest, older = Path(out_dir, "ckpt.pt"), Path(out_dir, f"ckpt_{last_step:07d}.pt")
    if keep and newest.exists() and not older.exists():
        os.link(newest, older)
    for path in sorted(Path(out_dir).glob("ckpt_*.pt"))[:-keep or None] if keep else ():
        path.unlink()


def print_plan(model, n_tokens, tokens_per_step):
    """What will be trained on how much."""
    counts = model.count_parameters()
    print(f"parameters: {counts['total']:,} = Kronecker factors {counts['factors']:,} + other matrices "
          f"{counts['matrices']:,} + biases and layer norms {counts['vectors']:,}")
    if factors_only:
        print("training the Kronecker factors alone")
    print(f"seed: {seed}; data: {dataset}, {n_tokens:,} tokens; a step takes {tokens_per_step:,}, the run "
          f"{tokens_per_step * max_iters / n_tokens:.2f} times the data")


def main():
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import checkpoint
    from data import batch_starts, even_starts, load_meta, load_tokens, step_seed, windows
    from model import Teacher, autocast_to, matmul_flops, pick_device

    # processes and the machine
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
    check_options(world_size)
    where = pick_device(device)
    on_cuda = where.type == "cuda"
    if world_size > 1:
        if on_cuda:
            where = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(where)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32 on a GPU
    number = dtype or ("bfloat16" if on_cuda and torch.cuda.is_bf16_supported() else "float32")
    autocast = autocast_to(where.type, number)

    # model and data
    vocab_size = load_meta(dataset)["vocab_size"]
    model, rest = make_model(vocab_size)
    context = block_size or model.config.block_size
    tokens = {split: load_tokens(dataset, split, model.config.vocab_size, context) for split in ("train", "val")}
    if factors_only:
        model.freeze_all_but_factors()
    model.to(where)
    guide = load_teacher(model.config, context).to(where) if teacher else None
    optimizer = model.configure_optimizers(learning_rate, weight_decay, (beta1, beta2), factor_lr_scale)
    if rest.get("optimizer"):
        try:
            optimizer.load_state_dict(rest["optimizer"])
        except ValueError as error:
            raise UsageError(f"the optimizer's state in {out_dir}/ckpt.pt does not fit the options ({error}): resume with "
                             "those that the run was started with") from None
    step, best_val_loss = rest.get("iter_num", 0), rest.get("best_val_loss", math.inf)
    global_batch_size = batch_size * gradient_accumulation_steps
    micro_steps = gradient_accumulation_steps // world_size
    tokens_per_step = global_batch_size * context
    runner = torch.compile(model) if compile else model
    if world_size > 1:
        runner = DistributedDataParallel(runner, device_ids=[where.index] if on_cuda else None)

    # reports come from one process
    is_main = rank == 0
    options = {name: globals()[name] for name in option_types(globals())}
    wandb_run = None
    if is_main:
        out_dir_lock = claim_out_dir()
        print_plan(model, len(tokens["train"]), tokens_per_step)
        log_file = open_log(step)
        for name, value in rest.get("config", {}).items():
            if name in options and name not in RUN_BY_RUN and value != options[name]:
                print(f"resumed with --{name}={options[name]}, where it was {value}")
        peak_flops = matmul_flops(where, number) * world_size
        if wandb_mode != "off":
            import wandb

            wandb_run = wandb.init(project=wandb_project, name=wandb_run_name or Path(out_dir).name, config=options,
                                   mode=wandb_mode)

    def report(**entry):
        log_file.write(json.dumps(entry) + "\n")
        if wandb_run:
            wandb_run.log(entry, step=entry["step"])

    def fail(what, bad_step):
        path = Path(out_dir, "ckpt.pt")
        kept = f"{path} is the last good checkpoint" if path.exists() else "no checkpoint was written yet"
        raise NotFiniteError(f"{what} not finite with step {bad_step} at learning rate {learning_rate_at(bad_step):.2e}, "
                             f"rank {rank}; {kept}: try a lower rate or --grad_clip")

    def mean_over_processes(total, count):
        pair = torch.stack((total.double(), torch.tensor(float(count), device=where, dtype=torch.double)))
        if world_size > 1:
            dist.all_reduce(pair)
        return (pair[0] / pair[1]).item()

    @torch.no_grad()
    def lesson(x):
        """What the teacher says of a batch."""
        return None if guide is None else Teacher(guide.hidden(x), guide.lm_head.weight, distill, temperature)

    @torch.no_grad()
    def evaluate(split):
        """Mean loss over windows spread evenly over a split: the same ones every time, for any number of processes."""
        model.eval()
        starts = even_starts(len(tokens[split]), context, eval_iters * batch_size)[rank::world_size]
        total = torch.zeros((), device=where)
        for begin in range(0, len(starts), batch_size):
            chunk = starts[begin:begin + batch_size]
            x, y = windows(tokens[split], chunk, context, model.config.vocab_size, where)
            with autocast:
                total += model(x, y) * len(chunk)
        model.train()
        return mean_over_processes(total, len(starts))

    def save(name, with_optimizer):
        if first_bad_step >= 0:
            fail("the loss or the gradient is", first_bad_step.item())
        if not all(p.isfinite().all() for p in model.parameters()):
            fail("the weights are", step - 1)
        if is_main:
            checkpoint.save(Path(out_dir, name), model, optimizer if with_optimizer else None, step, best_val_loss, options)

    def save_checkpoint():
        nonlocal saved_step, saved_at
        if is_main:
            os.fsync(log_file.fileno())  # a log that lacks lines of steps done is not mended by a resume
            keep_older(saved_step)
        save("ckpt.pt", with_optimizer=True)
        saved_step, saved_at = step, time.monotonic()

    def evaluate_and_keep_best():
        nonlocal best_val_loss
        train_loss, val_loss = evaluate("train"), evaluate("val")
        if not math.isfinite(train_loss + val_loss):
            fail("the evaluation's loss is", step - 1)
        if is_main:
            print(f"step {step:>6} | train loss {train_loss:.4f} | val loss {val_loss:.4f}")
            report(step=step, train_loss=train_loss, val_loss=val_loss)
        if val_loss < best_val_loss:
            best_val_loss = val_loss
            save("best.pt", with_optimizer=False)

    stop_signal = None

    def on_signal(number, frame):
        nonlocal stop_signal
        stop_signal = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)  # a second one exits at once

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)

    def must_stop():
        """Whether any process was told to stop: all of them stop after the same step."""
        flag = torch.tensor(int(stop_signal is not None))
        if world_size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    # the loop: `step` counts the optimizer steps done
    first_bad_step = torch.full((), -1, device=where)  # kept on the device: reading it would wait for the step
    saved_step, saved_at = step, time.monotonic()
    if step == 0:
        save_checkpoint()
        evaluate_and_keep_best()
    interval_start, interval_steps = time.perf_counter(), 0
    model.train()
    stopping = False
    while step < max_iters and not stopping:
        rate = learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        torch.manual_seed(step_seed(seed, step, rank))  # for dropout: a resumed run has the same masks
        starts = batch_starts(len(tokens["train"]), context, seed, step, global_batch_size)
        total = torch.zeros((), device=where)
        for micro_step in range(micro_steps):
            begin = (micro_step * world_size + rank) * batch_size
            rows = starts[begin:begin + batch_size]
            x, y = windows(tokens["train"], rows, context, model.config.vocab_size, where)
            is_last = micro_step == micro_steps - 1
            with runner.no_sync() if world_size > 1 and not is_last else nullcontext():  # gradients are reduced once
                with autocast:
                    loss = runner(x, y, lesson(x)) / micro_steps
                loss.backward()
            total += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        is_bad = ~torch.isfinite(total + grad_norm) & (first_bad_step < 0)
        first_bad_step = torch.where(is_bad, step, first_bad_step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        interval_steps += 1

        stopping = must_stop()
        is_last = stopping or step == max_iters
        if is_last or step % log_interval == 0 or step % eval_interval == 0:
            if first_bad_step >= 0:
                fail("the loss or the gradient is", first_bad_step.item())
            loss = mean_over_processes(total, 1)
            if is_main:
                seconds = time.perf_counter() - interval_start
                speed = tokens_per_step * interval_steps / seconds
                mfu = speed * model.flops_per_token() / peak_flops
                left = time.strftime("%H:%M:%S", time.gmtime((max_iters - step) * seconds / interval_steps))
                print(f"step {step:>6}/{max_iters} | loss {loss:.4f} | lr {rate:.2e} | norm {grad_norm.item():.2f} | "
                      f"{speed:,.0f} tokens/s | mfu {mfu:.0%} | {left} left")
                report(step=step, loss=loss, lr=rate, grad_norm=grad_norm.item(), tokens_per_second=speed, mfu=mfu)
            interval_start, interval_steps = time.perf_counter(), 0
        if step % eval_interval == 0 or step == max_iters:
            evaluate_and_keep_best()
            interval_start = time.perf_counter()
        is_due = checkpoint_minutes and is_main and time.monotonic() - saved_at > 60 * checkpoint_minutes
        if step % eval_interval == 0 or is_last or is_due:
            save_checkpoint()

    if is_main:
        if stopping:
            print(f"stopped by {stop_signal or 'another process'} after step {step}; --init_from=resume goes on")
        else:
            print(f"done: best validation loss {best_val_loss:.4f}, in {out_dir}/best.pt")
        log_file.close()
        out_dir_lock.close()
        if wandb_run:
            wandb_run.finish()
    if world_size > 1:
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads outlive the group, and now and then abort a process that ends in the usual way


if __name__ == "__main__":
    run(main)
