# GPT-2 in 82M parameters, every width and rank by predicted loss, trained further on OpenWebText.
#   python kron_decompose.py --budget=82M --calibrate=openwebtext
#   torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2_budget.py
# Cost: 11.8B tokens at 6.0e8 FLOP each, as train.py counts them, are 7.1e18 FLOP: 20 GPU hours at 1e14 FLOP/s, a
# third of an A100's peak in bfloat16. This is arithmetic, not a measurement.
#
# Why these numbers: those of train_gpt2.py, so that only the compression differs between the two models of 82M. Small
# models compressed this way need low rates (docs/report.md). No rate has been measured on GPT-2.
import torch

init_from = "checkpoints/best_82M.pt"
out_dir = "out/gpt2_budget"

# 32 sequences × 1024 tokens × 12 micro-steps over all GPUs = 393,216 tokens a step
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 12
max_iters = 30000

learning_rate = 6e-5
warmup_iters = 500

compile = torch.cuda.is_available()  # elsewhere it takes a C++ compiler, and minutes
wandb_mode = "offline"  # `wandb sync` uploads it; WANDB_MODE=online in the environment does so at once
