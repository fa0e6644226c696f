# The short training of each compressed model of `make demo`, on the data of its base.
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 200
learning_rate = 2e-3
warmup_iters = 20
beta2 = 0.99
eval_interval = 40
eval_iters = 5
log_interval = 40
