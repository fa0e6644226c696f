# Ours beside its peers at three sizes, for a GPT-2 over bytes of 4 blocks, 256 wide, in Hugging Face format: about a half,
# two thirds and a quarter of its 3.29M parameters. The first start is the base itself, which shows what further training
# alone gains. At the smallest size the MLPs alone leave nothing to compress.
base = "../shared/data/gpt2-bytes"
train_config = "config/compare_bytes_train.py"
dataset = "pydocs"
out_dir = "out/compare_bytes"
seeds = "1,2,3"

starts = f"""
dense, trained further: kron_decompose.py 256 1024 1 | --learning_rate=3e-5
1.7M Van Loan: kron_decompose.py 256 256 1 | --learning_rate=6e-4
1.7M Krony-PT's pruning: prune.py --keep=4 | --learning_rate=6e-4
1.7M SVD of the MLPs: kron_decompose.py 256 1 51 | --learning_rate=3e-4
1.7M SVD of all matrices: experiments/peers.py even_ranks 1.716M | --learning_rate=1e-4
1.7M activation-aware SVD, even ranks: experiments/peers.py even_ranks 1.716M --calibrate=pydocs | --learning_rate=3e-5
1.7M hidden units pruned, refitted: prune.py --dim=hidden --keep=4 --select=contribution --refit --calibrate=pydocs | --learning_rate=3e-4
1.7M one block in two: prune.py --dim=layer | --learning_rate=6e-4
1.7M ours, MLPs only: kron_decompose.py --budget=1.716M --matrices=mlp --calibrate=pydocs | --learning_rate=1e-4
1.7M ours: kron_decompose.py --budget=1.716M --calibrate=pydocs | --learning_rate=3e-5
1.7M ours, distilled: kron_decompose.py --budget=1.716M --calibrate=pydocs | --teacher={base} --learning_rate=3e-5
1.7M ours, distilled alone: kron_decompose.py --budget=1.716M --calibrate=pydocs | --teacher={base} --distill=1 --learning_rate=3e-5
1.7M ours, linear decay: kron_decompose.py --budget=1.716M --calibrate=pydocs | --decay=linear --learning_rate=3e-5
2.2M Van Loan: kron_decompose.py 256 512 1 | --learning_rate=3e-4
2.2M Krony-PT's pruning: prune.py | --learning_rate=6e-4
2.2M SVD of the MLPs: kron_decompose.py 256 1 102 | --learning_rate=3e-5
2.2M SVD of all matrices: experiments/peers.py even_ranks 2.238M | --learning_rate=3e-5
2.2M activation-aware SVD, even ranks: experiments/peers.py even_ranks 2.238M --calibrate=pydocs | --learning_rate=3e-5
2.2M hidden units pruned, refitted: prune.py --dim=hidden --keep=2 --select=contribution --refit --calibrate=pydocs | --learning_rate=1e-4
2.2M ours, MLPs only: kron_decompose.py --budget=2.238M --matrices=mlp --calibrate=pydocs | --learning_rate=3e-5
2.2M ours: kron_decompose.py --budget=2.238M --calibrate=pydocs | --learning_rate=3e-5
2.2M ours, distilled: kron_decompose.py --budget=2.238M --calibrate=pydocs | --teacher={base} --learning_rate=3e-5
0.9M SVD of all matrices: experiments/peers.py even_ranks 0.931M | --learning_rate=6e-4
0.9M activation-aware SVD, even ranks: experiments/peers.py even_ranks 0.931M --calibrate=pydocs | --learning_rate=3e-4
0.9M one block in four: prune.py --dim=layer --keep=4 | --learning_rate=1e-3
0.9M ours: kron_decompose.py --budget=0.931M --calibrate=pydocs | --learning_rate=1e-4
0.9M ours, distilled: kron_decompose.py --budget=0.931M --calibrate=pydocs | --teacher={base} --learning_rate=3e-4
0.9M ours, distilled alone: kron_decompose.py --budget=0.931M --calibrate=pydocs | --teacher={base} --distill=1 --learning_rate=3e-4
0.9M ours, linear decay: kron_decompose.py --budget=0.931M --calibrate=pydocs | --decay=linear --learning_rate=1e-4
"""
