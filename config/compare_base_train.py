# What each start of config/compare_{base,ablation,kronecker}.py gets: 100 steps of 2,048 tokens with the dense base as the
# teacher. Cross entropy alone would need far more tokens before its gradients say more than noise. On a processor without
# units for bfloat16 (lscpu: amx_bf16, avx512_bf16), float32 is faster.
teacher = "out/base/best.pt"
distill = 1.0
dtype = "bfloat16"
batch_size = 8
gradient_accumulation_steps = 1
max_iters = 100
warmup_iters = 10
beta2 = 0.99
eval_interval = 50
eval_iters = 12
log_interval = 50
