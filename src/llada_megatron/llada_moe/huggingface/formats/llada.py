"""Dense LLaDA: GSAI-ML/LLaDA-8B-Base, -Instruct, LLaDA-1.5. Keys in the manner of OLMo.

Source: the published configuration and modelling file of GSAI-ML/LLaDA-8B-Base. Of `blocks.{i}`, `ff_proj` is the gate
and `ff_out` the way down; `transformer.ff_out` is the output layer.
"""

from __future__ import annotations

from llada_megatron.llada_moe.huggingface import weights as w
from llada_megatron.llada_moe.huggingface.formats.table import Export, Field, Format

_BLOCK = "model.transformer.blocks.{layer}."

LLADA = Format(
    name="llada",
    title="dense LLaDA (LLaDA-8B, LLaDA-1.5)",
    model_type="llada",
    marker="d_model",
    names={
        w.EMBEDDING: ("model.transformer.wte.weight",),
        w.INPUT_NORM: (_BLOCK + "attn_norm.weight",),
        w.QKV: (_BLOCK + "q_proj.weight", _BLOCK + "k_proj.weight", _BLOCK + "v_proj.weight"),
        w.PROJECTION: (_BLOCK + "attn_out.weight",),
        w.MLP_NORM: (_BLOCK + "ff_norm.weight",),
        w.DENSE_UP: (_BLOCK + "ff_proj.weight", _BLOCK + "up_proj.weight"),
        w.DENSE_DOWN: (_BLOCK + "ff_out.weight",),
        w.FINAL_NORM: ("model.transformer.ln_f.weight",),
        w.OUTPUT: ("model.transformer.ff_out.weight",),
    },
    fields=(
        Field("n_layers", "num_layers"),
        Field("d_model", "hidden_size"),
        Field("mlp_hidden_size", "ffn_hidden_size", lambda config: int(float(config["mlp_ratio"]) * config["d_model"])),
        Field("n_heads", "num_attention_heads"),
        Field(
            "n_kv_heads",
            "num_key_value_heads",
            lambda config: 1 if config.get("multi_query_attention") else config["n_heads"],
        ),
        Field("vocab_size", "vocab_size"),
        Field("max_sequence_length", "max_sequence_length"),
        Field("mask_token_id", "mask_token_id", 126336),
        Field("eos_token_id", "eos_token_id"),
        Field("rms_norm_eps", "rms_norm_eps", 1e-5),
        Field("rope_theta", "rope_theta", 500000.0),
        Field("weight_tying", "tie_embeddings", False),
        Field(None, "head_dim", lambda config: config["d_model"] // config["n_heads"]),
    ),
    left_out={
        "activation_type": "swiglu",
        "block_type": "sequential",
        "layer_norm_type": "default",
        "max_sequence_length": 1024,
        "mlp_ratio": 4,
        "rms_norm_eps": 1e-5,
        "rope": False,
        "rope_theta": 10000.0,
        "weight_tying": True,
    },
    accepted={
        "activation_type": ("silu",),
        "block_type": ("llama",),
        "block_group_size": (1,),
        "rope": (True,),
        "alibi": (False,),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "attention_layer_norm": (False,),
        "include_bias": (False,),
        "include_qkv_bias": (False,),
        "bias_for_layer_norm": (False,),
        "scale_logits": (False,),
        "input_emb_norm": (False,),
        "clip_qkv": (None,),
        "rope_scaling": (None,),
    },
    implied={"family": "llada", "qk_norm": False, "rotary_fraction": 1.0},
    exports=Export(
        folder="llada",
        constants={
            "architectures": ["LLaDAModelLM"],
            "auto_map": {
                "AutoConfig": "configuration_llada.LLaDAConfig",
                "AutoModel": "modeling_llada.LLaDAModelLM",
                "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
            },
            "activation_type": "silu",
            "attention_dropout": 0.0,
            "attention_layer_norm": False,
            "block_group_size": 1,
            "block_type": "llama",
            "embedding_dropout": 0.0,
            "embedding_size": lambda model: model.vocab_size,
            "include_bias": False,
            "include_qkv_bias": False,
            "init_fn": "normal",
            "init_std": lambda model: model.init_std,
            "input_emb_norm": False,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "mlp_ratio": 4,
            "multi_query_attention": None,
            "pad_token_id": lambda model: model.eos_token_id,
            "residual_dropout": 0.0,
            "rope": True,
            "rope_full_precision": True,
            "scale_logits": False,
            "use_cache": False,
        },
    ),
)
