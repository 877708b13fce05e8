"""Megatron's ModuleSpec of our layers: which module stands in each place, local or Transformer Engine's."""

from __future__ import annotations

import copy
import functools
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from llada_megatron.llada_moe.config.model import MoEConfig
from llada_megatron.llada_moe.model.accelerations import transformer_engine_active
from llada_megatron.llada_moe.model.attention.pattern_attention import PatternAttention
from llada_megatron.llada_moe.model.experts import PermutedExperts
from llada_megatron.llada_moe.model.layer import DirectAttention, DirectExperts, DirectLayer
from llada_megatron.llada_moe.model.linear import ColumnLinear, RowLinear
from llada_megatron.llada_moe.model.norm import RMSNorm
from llada_megatron.llada_moe.model.routing import BlockRoutedLayer, BlockRouter


class LocalProvider(LocalSpecProvider):
    """Megatron's own parallel layers, with short ways in evaluation, with our norm and attention."""

    layer, attention, mixture = DirectLayer, DirectAttention, DirectExperts

    def column_parallel_linear(self) -> type:
        """A plain product in evaluation."""
        return ColumnLinear

    def row_parallel_linear(self) -> type:
        """A plain product in evaluation."""
        return RowLinear

    def layer_norm(self, *_: Any, **__: Any) -> type:
        """RMSNorm everywhere."""
        return RMSNorm

    def core_attention(self) -> type:
        """Attention over a pattern."""
        return PatternAttention

    def grouped_mlp_modules(self, *args: Any, **kwargs: Any) -> Any:
        """SequentialMLP's parameters, computed in one operation (a pair before megatron-core 0.19, then a partial)."""
        built = super().grouped_mlp_modules(*args, **kwargs)
        if isinstance(built, functools.partial):
            return functools.partial(PermutedExperts, *built.args, **built.keywords)
        return PermutedExperts, built[1]


def provider() -> Any:
    """The modules this machine builds from."""
    if not transformer_engine_active():
        return LocalProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    from llada_megatron.llada_moe.model.attention.engine_attention import EnginePatternAttention

    class TransformerEngineProvider(TESpecProvider):
        """Transformer Engine's linear layers, norms and grouped experts, with our attention."""

        layer, attention, mixture = TransformerLayer, SelfAttention, DirectExperts

        def core_attention(self) -> type:
            return EnginePatternAttention

        def fuse_layernorm_and_linear(self) -> bool:
            return False  # our layers keep their norms apart, under the names that local modules save

        def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, *rest: Any) -> Any:
            own = super() if moe_use_grouped_gemm else LocalProvider()
            return own.grouped_mlp_modules(moe_use_grouped_gemm, *rest)

    return TransformerEngineProvider()


@functools.cache
def _accumulating(layer: type[TransformerLayer]) -> type[TransformerLayer]:
    """The layer, whose products add their weight gradients to the gradient buffer although its block's do not."""

    class AccumulatingLayer(layer):  # type: ignore[misc, valid-type]
        def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
            own = copy.copy(config)
            own.gradient_accumulation_fusion = True
            super().__init__(own, *args, **kwargs)

    return AccumulatingLayer


def _layer(config: TransformerConfig, backend: Any, moe: bool) -> ModuleSpec:
    norm = backend.layer_norm(rms_norm=True)
    head_norm = backend.layer_norm(rms_norm=True, for_qk=True) if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    return ModuleSpec(
        module=backend.layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=backend.attention, params={"attn_mask_type": AttnMaskType.no_mask}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_mixture(config, backend) if moe else get_mlp_module_spec_for_backend(backend),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mixture(config: TransformerConfig, backend: Any) -> Any:
    """Routed experts: a ModuleSpec before megatron-core 0.19, then a partial."""
    spec = get_mlp_module_spec_for_backend(
        backend, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    if isinstance(spec, functools.partial):
        return functools.partial(backend.mixture, *spec.args, **spec.keywords)
    spec.module = backend.mixture
    return spec


def _route_by_blocks(layer: ModuleSpec, moe: MoEConfig) -> None:
    """Replace the router of a MoE layer, and the layer by one that tells it the segments."""
    mlp = layer.submodules.mlp
    submodules = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    submodules.router = functools.partial(
        BlockRouter, expert_capacity=moe.expert_capacity, block_size=moe.routing_block_size
    )
    layer.module = BlockRoutedLayer


def block_spec(
    config: TransformerConfig, routing: MoEConfig | None, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (and interleaved chunk), dense or MoE each as `moe_layer_freq` says.

    `routing`: the experts, None = there are none.
    """
    backend = provider()
    dense = _layer(config, backend, moe=False)
    moe = _layer(config, backend, moe=True) if config.num_moe_experts else dense
    if routing is not None and routing.expert_capacity > 0:
        _route_by_blocks(moe, routing)
    if config.gradient_accumulation_fusion:
        for spec in (dense,) if moe is dense else (dense, moe):
            spec.module = _accumulating(spec.module)
    kinds = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
    layers = [moe if kind else dense for kind in kinds]
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=layers[offset : offset + count], layer_norm=backend.layer_norm(rms_norm=True)
    )
