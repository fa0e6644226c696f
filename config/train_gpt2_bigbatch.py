# Ten steps with a very large batch, 32 × 1024 × 480 = 15.7M tokens each: a long run ends more quietly with it.
#   torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2_bigbatch.py
# or from any checkpoint, with --init_from=...
# Cost: 157M tokens at 6.0e8 FLOP each, as train.py counts them, are 9.4e16 FLOP: 0.3 GPU hours at 1e14 FLOP/s, a
# third of an A100's peak in bfloat16. This is arithmetic, not a measurement.
#
# Krony-PT as published (padas-lab-de/krony-PT, progress.md): "a training for 10 steps only, with very high batch size".
#
# Why these numbers: the peak rate of train_gpt2.py, without decay, at a batch 40 times as large, with less noise in it.
import torch

init_from = "out/VL_768_768_1/best.pt"
out_dir = "out/VL_768_768_1_bigbatch"

batch_size = 32
block_size = 1024
gradient_accumulation_steps = 480
max_iters = 10

learning_rate = 6e-5
decay_lr = False
warmup_iters = 0

compile = torch.cuda.is_available()  # elsewhere it takes a C++ compiler, and minutes
eval_interval = 5
log_interval = 1
wandb_mode = "offline"  # `wandb sync` uploads it; WANDB_MODE=online in the environment does so at once
