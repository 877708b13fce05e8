"""What the fork server of `parallel.ranks` imports once for all its ranks."""

import warnings

import torch

from llada_megatron.parallel import device

warnings.simplefilter("ignore")
torch.set_num_threads(1)
device.install()
