# The baseline: GPT-2 itself, dense, trained further on the same data. Measure the cost of compression against this
# model, not against GPT-2, which was trained on other text: nanoGPT reports 3.11 nats per token before and about 2.85 after.
#   torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2_dense.py
# Its best checkpoint can teach the others, for the FLOP of its forward pass, 2.8e8 a token, on top of theirs:
#   python train.py config/train_gpt2_budget.py --out_dir=out/distilled --teacher=out/gpt2_dense/best.pt
# Cost: 11.8B tokens at 8.5e8 FLOP each, as train.py counts them, are 1.0e19 FLOP: 28 GPU hours at 1e14 FLOP/s, a
# third of an A100's peak in bfloat16. This is arithmetic, not a measurement.
#
# Why these numbers: those of train_gpt2.py and train_gpt2_budget.py, token for token.
import torch

init_from = "gpt2"
out_dir = "out/gpt2_dense"

# 32 sequences × 1024 tokens × 12 micro-steps over all GPUs = 393,216 tokens a step
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 12
max_iters = 30000

learning_rate = 6e-5
warmup_iters = 500

compile = torch.cuda.is_available()  # elsewhere it takes a C++ compiler, and minutes
wandb_mode = "offline"  # `wandb sync` uploads it; WANDB_MODE=online in the environment does so at once
