# 68M: GPT-2 with small factors, (32, 64, 4): the MLP matrices all but vanish, and training has to make up for it.
#   python kron_decompose.py 32 64 4
#   torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2_68m.py
init_from = "checkpoints/VL_32_64_4.pt"
out_dir = "out/VL_32_64_4"
dataset = "openwebtext"

# 32 sequences × 1024 tokens × 12 micro-steps over all GPUs = 393,216 tokens a step
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 12
max_iters = 30000

# far from the start that it comes from: a higher rate, and higher still for the factors
learning_rate = 3e-4
min_lr = 3e-5
factor_lr_scale = 2.0
warmup_iters = 1000
weight_decay = 0.1

eval_interval = 500
eval_iters = 50
log_interval = 10

wandb_mode = "offline"  # `wandb sync` uploads it; WANDB_MODE=online in the environment does so at once
wandb_project = "kronygpt"
wandb_run_name = "VL_32_64_4"
