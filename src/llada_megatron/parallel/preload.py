"""What every rank of `parallel.ranks` begins with: where ranks are forked, their server imports it once for all.

`device.install` asks CUDA, and a process that has done so cannot fork ranks that use a GPU; hence they are forked only
where there is none.
"""

import warnings

import torch

from llada_megatron.parallel import device

warnings.simplefilter("ignore")
torch.set_num_threads(1)
device.install()
