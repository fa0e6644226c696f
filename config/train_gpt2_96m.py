# 96M (Krony-PT writes 95M): GPT-2 with every second row of c_fc and column of c_proj kept, (384, 3072, 1).
#   python prune.py
#   torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2_96m.py
# Cost: 11.8B tokens at 6.8e8 FLOP each, as train.py counts them, are 8.1e18 FLOP: 22 GPU hours at 1e14 FLOP/s, a
# third of an A100's peak in bfloat16. This is arithmetic, not a measurement.
#
# Krony-PT as published (padas-lab-de/krony-PT): no perplexities of the pruned start. Its Van Loan of this shape scores 41.80
# on wikitext-103, 35.50 on wikitext-2 and 61.34 on lambada; one of the recipes for that has 250,000 steps from 1.8e-3 down
# to 6e-5, batch_size 24 and gradient_accumulation_steps 5.
#
# Why these numbers: those of train_gpt2.py, so that only the model differs between the two sizes.
import torch

init_from = "checkpoints/prune_384_3072.pt"
out_dir = "out/prune_384_3072"

# 32 sequences × 1024 tokens × 12 micro-steps over all GPUs = 393,216 tokens a step
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 12
max_iters = 30000

learning_rate = 6e-5
warmup_iters = 500

compile = torch.cuda.is_available()  # elsewhere it takes a C++ compiler, and minutes
wandb_mode = "offline"  # `wandb sync` uploads it; WANDB_MODE=online in the environment does so at once
