# Starts at a quarter and at half of the MLP parameters, for the base of `make demo`, which config/demo_base.py trains:
# 4 layers, 128 wide, over bytes. The first start is the base itself, (C, 4C, 1).
base = "out/demo/base/best.pt"
train_config = "config/compare_small_train.py"
dataset = "pydocs"
out_dir = "out/compare_small"
learning_rates = "3e-4,1e-3,3e-3"

starts = f"""
dense, trained further: kron_decompose.py 128 512 1
Van Loan (128, 128, 1): kron_decompose.py 128 128 1
calibrated (128, 128, 1): kron_decompose.py 128 128 1 --calibrate=pydocs
Van Loan (64, 16, 15): kron_decompose.py 64 16 15
calibrated (64, 16, 15): kron_decompose.py 64 16 15 --calibrate=pydocs
SVD (128, 1, 25): kron_decompose.py 128 1 25
calibrated (128, 1, 25): kron_decompose.py 128 1 25 --calibrate=pydocs
a quarter of the hidden units, refitted: prune.py --dim=hidden --keep=4 --select=contribution --refit --calibrate=pydocs
one block in four: prune.py --dim=layer --keep=4
distilled (128, 1, 25), equal steps: kron_decompose.py 128 1 25 --calibrate=pydocs | --teacher={base}
budget search, a quarter: kron_decompose.py --budget=0.4495M --calibrate=pydocs
even rows kept: prune.py
Van Loan (128, 256, 1): kron_decompose.py 128 256 1
calibrated (128, 256, 1): kron_decompose.py 128 256 1 --calibrate=pydocs
SVD (128, 1, 51): kron_decompose.py 128 1 51
calibrated (128, 1, 51): kron_decompose.py 128 1 51 --calibrate=pydocs
half of the hidden units, refitted: prune.py --dim=hidden --keep=2 --select=contribution --refit --calibrate=pydocs
one block in two: prune.py --dim=layer
budget search, half: kron_decompose.py --budget=0.5805M --calibrate=pydocs
"""
