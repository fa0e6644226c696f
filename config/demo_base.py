# A small dense GPT-2 over bytes, trained on Python's documentation: the base of `make demo`. Two minutes on two cores.
out_dir = "out/demo/base"
dataset = "pydocs"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128

batch_size = 16
gradient_accumulation_steps = 1
overwrite = True
max_iters = 800
learning_rate = 4e-3
warmup_iters = 50
beta2 = 0.99
eval_interval = 400
eval_iters = 20
log_interval = 100
