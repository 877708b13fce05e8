"""The typed configuration of a run: what every YAML key means, its published default and its source.

Sources named below: P8B = arXiv 2502.09992 and the GUIDELINES of ML-GSAI/LLaDA; PMOE = arXiv 2509.24389 (LLaDA-MoE);
L2 = the LLaDA2.0 report and the published configuration of inclusionAI/LLaDA2.0-*; PV2 = arXiv 2608.03457
(LLaDA MoE v2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture-of-Experts part of a model. Widths are per expert, in units of hidden features."""

    num_experts: int
    top_k: int
    expert_ffn_hidden_size: int
    shared_expert_ffn_hidden_size: int = 0
    """Width of the always-on shared expert (LLaDA2: one expert wide); 0 = none (LLaDA-MoE)."""
    leading_dense_layers: int = 0
    """Layers at the bottom that keep a dense feed-forward (LLaDA2: `first_k_dense_replace` 1)."""
    score_function: Literal["softmax", "softmax_normalized", "sigmoid"] = "softmax"
    """softmax over all experts, then top-k, not renormalised (PMOE); softmax_normalized, the same divided by the sum
    over the chosen (PV2, Qwen3-MoE); sigmoid, normalised over the chosen (L2)."""
    expert_bias: bool = False
    """A bias that takes part in the selection only (aux-loss-free balancing; L2)."""
    expert_bias_update_rate: float = 0.0
    """Step of the bias update; 0 freezes it, as LLaDA2's released training code does."""
    num_expert_groups: int = 1
    expert_groups_top_k: int = 1
    """Group-limited routing: keep the best groups by the sum of their two best scores (L2: 8 groups, 4 kept)."""
    expert_capacity: int = 0
    """Block routing (LLaDA2.2: 48): the tokens of a block share these many experts, the best by the block's highest
    score, and each takes its top_k among them; 0 = each token chooses among all."""
    routing_block_size: int = 32
    """Positions of such a block, counted from the start of each document (LLaDA2.2: 32)."""
    routed_scaling_factor: float = 1.0
    aux_loss_coefficient: float = 0.0
    """Balance loss N * sum f_i P_i (PMOE: 0.01)."""
    z_loss_coefficient: float = 0.0
    """Router logsumexp^2 (PMOE: 0.001)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of one masked diffusion (or autoregressive) Transformer."""

    family: Literal["llada", "llada_moe", "llada2", "qwen3", "qwen3_moe"]
    """Which published family the architecture follows (used by conversion). Models of qwen3 and qwen3_moe start from
    autoregressive checkpoints and have no published format of their own."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the dense SwiGLU feed-forward; of the leading dense layers in a MoE model."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_sequence_length: int
    mask_token_id: int
    eos_token_id: int
    delete_token_id: int | None = None
    """Predicted where a token is to be deleted (LLaDA2.2: 156930); null = the model was not trained to."""
    insert_token_id: int | None = None
    """Predicted where one is to be inserted before a token (LLaDA2.2: 156931, published as `split_token_id`)."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rotary_fraction: float = 1.0
    """Part of each head's features that is rotated (LLaDA2: 0.5)."""
    qk_norm: bool = False
    """RMSNorm over each query and key head, before the rotation (LLaDA-MoE, LLaDA2)."""
    tie_embeddings: bool = False
    init_std: float = 0.02
    moe: MoEConfig | None = None


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learnt. The noise keys and the block size are read by the diffusion objective only."""

    kind: Literal["diffusion", "autoregressive"] = "diffusion"
    block_size: int | None = None
    """Attention is full inside blocks of this many positions, counted from the start of each document, and causal
    between them; null = full (LLaDA2: 32)."""
    time_sampling: Literal["uniform", "stratified"] = "uniform"
    """t per sequence: independent (P8B training code), or one stratum of [0, 1) per sequence of the global batch."""
    epsilon: float = 1e-3
    """Mask ratio p = (1 - epsilon) t + epsilon (P8B)."""
    mask_ratio_min: float = 0.0
    mask_ratio_max: float = 1.0
    """Band that t is drawn from (LLaDA2 SFT: 0.3-0.8)."""
    random_length_probability: float = 0.01
    """Share of sequences cut to a length drawn from U{1..sequence_length} (P8B: 1 %)."""
    normalization: Literal["all_tokens", "answer_length", "masked_tokens"] = "all_tokens"
    """What the weighted cross-entropy is divided by (P8B: all tokens of the batch); masked_tokens = the supervised."""
    replace_ratio: float = 0.0
    """Training for editing, as LLaDA2.1 has it: this share of the tokens that are not masked is shown as another,
    random token, and all that are not masked are supervised too, with weight 1: which are wrong, and what they should
    be. 0 = off. LLaDA2.1's own rate is not published."""


@dataclass(frozen=True, kw_only=True)
class DataSetConfig:
    """One prepared set: the PREFIX that `llada prepare` wrote, and its share of the blend."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read."""

    sets: list[DataSetConfig]
    validation_fraction: float = 0.01
    """Share of the documents held out for validation."""
    isolate_documents: bool = True
    """Attention does not cross the documents packed into one window."""


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Learning rate over steps: warm-up, constant with drops, decay to the end (warmup-stable-decay)."""

    peak: float
    warmup_steps: int = 0
    drops: list[LearningRateDropConfig] = field(default_factory=list)
    decay_steps: int = 0
    """Length of the decay that ends at the last step of the run."""
    decay_shape: Literal["linear", "cosine", "inverse_sqrt"] = "linear"
    final: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LearningRateDropConfig:
    """From this step on the constant part runs at `value`."""

    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Megatron's, with the state sharded over data-parallel ranks)."""

    learning_rate: LearningRateConfig
    beta1: float = 0.9
    beta2: float = 0.95
    """PV2, SMDM."""
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """P8B."""
    clip_grad_norm: float = 1.0
    """SMDM, PV2; 0 = no clipping."""


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How the model is spread over ranks. World size = tensor * pipeline * context * data."""

    tensor_parallel: int = 1
    sequence_parallel: bool = False
    pipeline_parallel: int = 1
    pipeline_chunks_per_rank: int = 1
    """More than 1 = interleaved schedule."""
    context_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    expert_dispatcher: Literal["alltoall", "allgather"] = "alltoall"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and how large."""

    steps: int
    sequence_length: int
    global_batch_size: int
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = 1
    """Sequences per forward pass on one data-parallel rank; the rest is gradient accumulation."""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 main weights and reduces gradients in fp32."""
    recompute: Literal["none", "full"] = "none"
    """full = keep only each layer's input, run the layer again in the backward pass."""
    logits_chunk_mb: int = 256
    """The output layer and loss run over row chunks whose fp32 logits on one rank take at most this much memory."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When state is written and what is kept."""

    interval: int = 1000
    keep_last: int = 3
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever; 0 = none do."""
    copy_to: str | None = None
    """A second folder, on other storage, that every checkpoint is copied to in the background; a run resumes from
    either. A folder of its own for each run."""
    max_failures: int = 3
    """A save that fails is reported and tried again at the next interval; so many in a row end the run."""
    asynchronous: bool = False
    """Write in the background where the installed versions do that safely; otherwise a message says why not."""
    load: str | None = None
    """Start from these weights: a step directory, or a run or an import, whose newest whole checkpoint counts (a run
    that resumes its own checkpoints ignores it)."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Bits per byte on the held-out documents; 0 steps = never."""

    interval: int = 0
    sequences: int = 64


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """What happens when a step goes wrong (a loss or gradient that is not finite, a loss that jumps) or never ends.

    Every decision is in the log, in TensorBoard, in metrics.jsonl and in the checkpoint.
    """

    retry: bool = True
    """Run a bad step once more from the same state: a passing fault of the machine gives another result."""
    not_finite: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient norm that is NaN or infinite: end the run; leave the batch out; or go back to the newest
    whole checkpoint and leave the batch out there."""
    spike: Literal["ignore", "skip", "rollback"] = "ignore"
    """A loss far above those before it."""
    spike_window: int = 128
    """Accepted losses that the mean and the deviation are taken over; half of them must be there first."""
    spike_threshold: float = 6.0
    """Standard deviations above the mean that make a spike."""
    skip_steps: int = 1
    """Batches left out after going back: the one that did it and those before it."""
    learning_rate_factor: float = 1.0
    """Multiplies every learning rate after going back (P8B: 4e-4 to 1e-4, a factor of 0.25)."""
    max_decisions: int = 10
    """Batches left out and times gone back before the run ends instead."""
    hang_factor: float = 10.0
    """A rank hangs when its step takes this many times the median step ..."""
    hang_minimum_s: float = 300.0
    """... and at least so many seconds."""
    hang_other_s: float = 1800.0
    """The same for what is not a step: start, validation, saving, loading, and the first steps of a start."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported, every `interval` steps."""

    interval: int = 10
    tensorboard: bool = True


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `model` is a mapping, or the name of a file in configs/models (or its path); `recovery` the same
    with configs/recovery."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    optimizer: OptimizerConfig
    output_dir: str
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
