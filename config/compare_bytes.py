# The second base: ours beside its peers at three sizes, for a GPT-2 over bytes of 4 blocks, 256 wide, in Hugging Face
# format: 52, 28 and 21 % of its 3.29M parameters. The first start is the base itself, which shows what further training
# alone gains.
base = "../shared/data/gpt2-bytes"
train_config = "config/compare_bytes_train.py"
dataset = "pydocs"
out_dir = "out/compare_bytes"
seeds = "1,2,3"

starts = f"""
dense, trained further: kron_decompose.py 256 1024 1 | --learning_rate=3e-5
1.7M Van Loan: kron_decompose.py 256 256 1 | --learning_rate=6e-4
1.7M hidden units pruned, refitted: prune.py --dim=hidden --keep=4 --select=contribution --refit --calibrate=pydocs | --learning_rate=3e-4
1.7M SVD-LLM: experiments/peers.py svd_llm 1.716M --calibrate=pydocs | --learning_rate=3e-5
1.7M activation-aware SVD, even ranks: experiments/peers.py even_ranks 1.716M --calibrate=pydocs | --learning_rate=3e-5
1.7M ours: kron_decompose.py --budget=1.716M --calibrate=pydocs | --learning_rate=1e-5
1.7M ours, distilled: kron_decompose.py --budget=1.716M --calibrate=pydocs | --teacher={base} --learning_rate=3e-5
0.9M SVD-LLM: experiments/peers.py svd_llm 0.931M --calibrate=pydocs | --learning_rate=3e-4
0.9M activation-aware SVD, even ranks: experiments/peers.py even_ranks 0.931M --calibrate=pydocs | --learning_rate=3e-4
0.9M ours: kron_decompose.py --budget=0.931M --calibrate=pydocs | --learning_rate=3e-5
0.9M ours, distilled: kron_decompose.py --budget=0.931M --calibrate=pydocs | --teacher={base} --features=4 --learning_rate=2e-4
0.7M activation-aware SVD, even ranks: experiments/peers.py even_ranks 0.700M --calibrate=pydocs | --learning_rate=3e-4
0.7M ours: kron_decompose.py --budget=0.700M --calibrate=pydocs | --learning_rate=1e-4
0.7M ours, distilled: kron_decompose.py --budget=0.700M --calibrate=pydocs | --teacher={base} --features=4 --learning_rate=2e-4
"""
