"""What every rank of `parallel.ranks` begins with: where ranks are forked, their server imports it once for all.

`device.install` asks CUDA, and a process that has done so cannot fork ranks that use a GPU; hence they are forked only
where there is none. The modules that most ranks need come with it, since each rank would import them anew.
"""

import importlib
import warnings

import torch

from llada_megatron.parallel import device

warnings.simplefilter("ignore")
torch.set_num_threads(1)
device.install()
for _name in ("build", "training.trainer", "sampling.session"):  # Megatron's modules, so not before `device.install`
    importlib.import_module(f"llada_megatron.parallel.{_name}")
