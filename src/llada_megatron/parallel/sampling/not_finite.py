"""Why a model gives logits that are no numbers: asked once sampling has met one, since a search reads every weight."""

from __future__ import annotations

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.finite import first_not_finite
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel


def not_finite(loaded: LoadedModel) -> CheckpointError:
    """The error of a model whose logits are NaN or infinite, with the first weight of this rank that is.

    Every rank of the replica meets the same statistics, and so makes this error in the same step.
    """
    fault = f"{loaded.path}: the model's logits are not finite numbers, and every token would be noise"
    for name, weight in loaded.model.state_dict().items():
        found = first_not_finite(weight) if weight is not None and hasattr(weight, "is_floating_point") else None
        if found is not None:
            return CheckpointError(
                f"{fault}: of its weights, {name} is {found[1]} at {list(found[0])}. The checkpoint was damaged before "
                "it was written, or the training had diverged: take an earlier one, or import an undamaged copy"
            )
    return CheckpointError(
        f"{fault}. The weights of this rank are finite: those of another may not be, or activations grow beyond "
        f"{loaded.model.config.params_dtype}; convert the checkpoint to fp32 to see which"
    )
