"""torch's AdamW as the optimizer of Megatron's distributed optimizer, which expects Transformer Engine's or Apex's."""

from __future__ import annotations

from typing import Any

import torch


def patch_resume() -> None:
    """Without transformer-engine or NVIDIA's apex the optimizer is torch's AdamW, which keeps a `step` per parameter.

    distrib_optimizer.py:938 copies every entry of the state from the checkpoint, which does not carry `step`; and :820
    gives all parameters one shared `step`, which AdamW then advances once per parameter: the resumed run is silently
    wrong.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    cls = distrib_optimizer.DistributedOptimizer
    load_state_dict = cls.load_state_dict

    @torch.no_grad()
    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        state = {"param": main, **self.optimizer.state[main]}
        for key, value in tensors.items():
            if key in state and key != "step":
                state[key].copy_(value)

    def load(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    cls._set_main_param_and_optimizer_states = set_states
    cls.load_state_dict = load
