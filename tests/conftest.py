"""What every test needs: one thread per process, and Megatron-Core ready for a machine without a GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import hypothesis
import torch

from llada_megatron.parallel import device

torch.set_num_threads(1)
device.install()

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("repeatable")
