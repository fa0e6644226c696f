# 68M (Krony-PT writes 67M): GPT-2 with small factors, (32, 64, 4). The MLP matrices nearly vanish, and training has to
# make up for it.
#   python kron_decompose.py 32 64 4
#   torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2_68m.py
# Cost: 11.8B tokens at 5.9e8 FLOP each, as train.py counts them, are 6.9e18 FLOP: 19 GPU hours at 1e14 FLOP/s, a
# third of an A100's peak in bfloat16. This is arithmetic, not a measurement.
#
# Krony-PT as published (padas-lab-de/krony-PT): no perplexities at this size. The recipe for (64, 24, 1) has 200,000 steps
# from 6e-4 down to 6e-5, a warm-up of 1000, batch_size 8 and block_size 1024.
#
# Why these numbers: the steps of train_gpt2.py at a higher rate, since the start is far from GPT-2; half of Krony-PT's rate,
# with twice as much for the factors, which are what is new.
import torch

init_from = "checkpoints/VL_32_64_4.pt"
out_dir = "out/VL_32_64_4"

# 32 sequences × 1024 tokens × 12 micro-steps over all GPUs = 393,216 tokens a step
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 12
max_iters = 30000

learning_rate = 3e-4
factor_lr_scale = 2.0
warmup_iters = 1000

compile = torch.cuda.is_available()  # elsewhere it takes a C++ compiler, and minutes
wandb_mode = "offline"  # `wandb sync` uploads it; WANDB_MODE=online in the environment does so at once
