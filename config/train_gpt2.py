# Krony-PT's 82M: GPT-2, Van Loan (768, 768, 1) in the MLPs, trained on OpenWebText.
#   python kron_decompose.py 768 768 1
#   torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
# Cost: 11.8B tokens at 6.0e8 FLOP each, as train.py counts them, are 7.1e18 FLOP: 20 GPU hours at 1e14 FLOP/s, a
# third of an A100's peak in bfloat16. This is arithmetic, not a measurement.
#
# Krony-PT as published (its repository, padas-lab-de/krony-PT, config/train_gpt2.py and the history of it): the last recipe
# for this shape has 10,000 steps at a constant 6e-5, a warm-up of 100, weight decay 0.1, batch_size 32, block_size 1024 and
# gradient_accumulation_steps 4, from a checkpoint of 30,000 earlier steps; four A100, no torch.compile. The 81M model scores
# 41.98 on wikitext-103, 34.99 on wikitext-2 and 64.92 on lambada.
#
# Why these numbers: one run in place of a chain of them, at the rate of Krony-PT's last one, with a cosine to a tenth of it.
import torch

init_from = "checkpoints/VL_768_768_1.pt"
out_dir = "out/VL_768_768_1"

# 32 sequences × 1024 tokens × 12 micro-steps over all GPUs = 393,216 tokens a step
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 12
max_iters = 30000

learning_rate = 6e-5
warmup_iters = 500

compile = torch.cuda.is_available()  # elsewhere it takes a C++ compiler, and minutes
wandb_mode = "offline"  # `wandb sync` uploads it; WANDB_MODE=online in the environment does so at once
