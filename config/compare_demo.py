# `make demo`: Van Loan at two sizes, Krony-PT's pruning at the larger one, Van Loan's smaller shape calibrated, and the
# whole model by predicted loss at the smaller size and at half of it, beside the dense base of config/demo_base.py. The
# first start is the base itself, (C, 4C, 1), which shows what further training alone gains.
base = "out/demo/base/best.pt"
train_config = "config/demo_train.py"
dataset = "pydocs"
out_dir = "out/demo"

starts = """
dense, trained further (128, 512, 1): kron_decompose.py 128 512 1
Van Loan (128, 128, 1): kron_decompose.py 128 128 1
calibrated (128, 128, 1): kron_decompose.py 128 128 1 --calibrate=pydocs
whole model, by budget: kron_decompose.py --budget=449.3K --calibrate=pydocs
whole model, half of that: kron_decompose.py --budget=224.6K --calibrate=pydocs
Van Loan (128, 256, 1): kron_decompose.py 128 256 1
even rows kept (64, 512, 1): prune.py
"""
