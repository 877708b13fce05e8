"""The mutants: one wrong line each, and the few tests that are to notice it.

Ours, and not made by a tool such as mutmut or cosmic-ray: those change every operator of a file and run the whole suite
for each, hours of ranks for mutants most of which mean nothing; these say what could really be written wrong.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change of one line, in the package."""

    area: str
    file: str
    """Path in `src/llada_megatron`."""
    old: str
    """Text that the file has once."""
    new: str
    tests: tuple[str, ...]
    """Words of a pytest command line."""

    def __str__(self) -> str:
        return f"{self.area}: {self.file}: {' '.join(self.old.split())} → {' '.join(self.new.split()) or 'nothing'}"


_GROUPS: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    (
        "noise",
        "llada_moe/diffusion/noise.py",
        "tests/llada_moe/diffusion/test_noise.py",
        [
            ("return (1.0 - self._epsilon) * t + self._epsilon", "return t"),
            ("mask[untruncated:] = False", "pass"),
            ("< self._replace_ratio) & ~mask", "< self._replace_ratio)"),
            ("return 1 + int(size * length)", "return int(size * length)"),
            ("[0, stream, at.epoch, at.window]", "[0, stream, 0, at.window]"),
            ("_REPLACED, _SUBSTITUTE = range(6)", "_REPLACED, _SUBSTITUTE = 0, 1, 2, 3, 1, 5"),
            ("stream = purpose * len(_SPLITS) + self._split", "stream = purpose * len(_SPLITS)"),
            ("choice * (len(self._ids) - is_word)", "choice * (len(self._ids) - 1)"),
            ("t = low + (high - low) * t", "t = low + high * t"),
            ("chance < self._cut_probability", "chance > self._cut_probability"),
        ],
    ),
    (
        "objective",
        "llada_moe/objectives/masked_diffusion.py",
        "tests/llada_moe/data/test_training_data.py tests/parallel/training/test_validation.py "
        "-k 'diffusion or replaced'",
        [
            ("np.float32(1.0 / noise.ratio if noise.ratio > 0 else 0.0)", "np.float32(1.0)"),
            ("np.where(noise.mask, weights, np.float32(1.0))[: noise.length]", "weights[: noise.length]"),
            ("whole_range and not self.config.replace_ratio and", "whole_range and"),
            ('self.config.normalization == "all_tokens"', "True"),
            ("return not self.config.replace_ratio", "return True"),
        ],
    ),
    (
        "objective",
        "llada_moe/objectives/normalization.py",
        "tests/llada_moe/objectives/test_normalization.py",
        [
            ("length / answer.clamp(min=1)", "1 / answer.clamp(min=1)"),
            ("sequences * length, counts.masked)", "sequences * length, counts.untruncated)"),
            ("int((batch.weights > 0).sum())", "int((batch.weights > 1).sum())"),
            ("return above / below if below else 0.0", "return above / below if below else 1.0"),
        ],
    ),
    (
        "objective",
        "llada_moe/objectives/autoregressive.py",
        "tests/llada_moe/data/test_training_data.py -k autoregressive",
        [
            ("weights[boundaries[1:] - 1] = 0.0", "weights[-1] = 0.0"),
            ("np.append(tokens[1:], tokens[-1])", "np.append(tokens[:-1], tokens[-1])"),
        ],
    ),
    (
        "objective",
        "parallel/training/validation.py",
        "tests/parallel/training/test_validation.py -k 'layout or fill'",
        [
            ("float(nats) / run.layout.tensor_parallel", "float(nats)"),
            ("batch.weights[surplus], batch.untruncated[surplus] = 0.0, 0", "batch.untruncated[surplus] = 0"),
        ],
    ),
    (
        "attention",
        "llada_moe/model/attention/per_document.py",
        "tests/llada_moe/model/test_attention.py tests/llada_moe/model/attention/test_backends.py",
        [
            ("columns[None, :] > rows[:, None]", "columns[None, :] >= rows[:, None]"),
            ("if block == 1 and q.size(2) == k.size(2):", "if block == 1:"),
            (
                "zip(columns, packed.rows, strict=True)]",
                "zip(columns, packed.rows[:1] * len(packed.rows), strict=True)]",
            ),
            ("of_whole[:, :, : ctx.keys].add_(of_prefix)", "pass"),
            ("q, k, v, scale=scale,", "q, k, v, scale=1.0,"),
            (
                "_Prefix.apply(whole, keys) if whole.requires_grad else (whole[:, :, :keys], whole)",
                "whole[:, :, :keys], whole",
            ),
        ],
    ),
    (
        "attention",
        "llada_moe/model/attention/pattern_attention.py",
        "tests/llada_moe/model/test_attention.py",
        [("first=self.context_group.rank() * query.size(0),", "first=0,")],
    ),
    (
        "attention",
        "llada_moe/model/attention/window_attention.py",
        "tests/llada_moe/model/test_windows.py",
        [("seen[own, window.shadow_first + own] = False", "seen[own, own] = False")],
    ),
    (
        "attention",
        "llada_moe/model/attention/packed_documents.py",
        "tests/llada_moe/model/attention/test_against_softmax.py tests/llada_moe/model/attention/test_backends.py",
        [
            ("np.arange(part.before, part.before + part.queries) // block", "np.arange(part.queries) // block"),
            ("keys = pattern.keys_seen(stop - segment.start,", "keys = pattern.keys_seen(stop - start,"),
            ("first_keys[segment.row] = segment.start", "first_keys[segment.row] = 0"),
            (
                "key = (content, pattern, batch, positions, first, queries)",
                "key = (content, batch, positions, first, queries)",
            ),
            ("if len(self._packed) == self._kept:", "if False:"),
        ],
    ),
    (
        "attention",
        "llada_moe/model/attention/flex.py",
        "tests/llada_moe/model/attention/test_against_softmax.py",
        [
            ("(ends >= edges + TILE)", "(ends >= edges)"),
            ("(begins[b, q] <= k) & (k < ends[b, q])", "k < ends[b, q]"),
            ("_ordered(some & ~whole, device)", "_ordered(some, device)"),
        ],
    ),
    (
        "attention",
        "llada_moe/model/attention/varlen.py",
        "tests/llada_moe/model/attention/test_against_softmax.py",
        [("if packed.pattern.block == 1:", "if False:")],
    ),
    (
        "attention",
        "llada_moe/model/attention/engine_attention.py",
        "tests/llada_moe/model/attention/test_engine_attention.py",
        [
            ("alone.context_parallel_size = 1", "pass"),
            ("AttnMaskType.padding if packed.pattern.block is None", "AttnMaskType.padding if True"),
        ],
    ),
    (
        "attention",
        "llada_moe/model/attention/packed_keys.py",
        "tests/llada_moe/model/attention/test_against_softmax.py",
        [("max(part.keys for part in packed.parts)", "max(part.queries for part in packed.parts)")],
    ),
    (
        "attention",
        "llada_moe/model/patterns.py",
        "tests/llada_moe/model/test_attention.py",
        [
            ("min(length, -(-end // block) * block)", "min(length, end)"),
            ("first = start // span * span", "first = start"),
        ],
    ),
    (
        "attention",
        "llada_moe/model/patterns.py",
        "tests/llada_moe/model/test_routing.py -k numbered",
        [("(starts.diff() + size - 1) // size", "starts.diff() // size")],
    ),
    (
        "router",
        "llada_moe/model/routing.py",
        "tests/llada_moe/model/test_routing.py",
        [
            ("            self.expert_bias = kept\n", "            pass\n"),
            ('ranked, "amax")', 'ranked, "mean")'),
            (".scatter_(1, chosen, False)", ".scatter_(1, chosen[:, 1:], False)"),
            ("torch.distributed.ReduceOp.MAX", "torch.distributed.ReduceOp.MIN"),
            ("part * self.tp_group.size() + self.tp_group.rank()", "part * self.tp_group.size()"),
            (".sigmoid().flatten(0, 1) + self.expert_bias", ".sigmoid().flatten(0, 1)"),
        ],
    ),
    (
        "router",
        "llada_moe/model/transformer.py",
        "tests/parallel/training/test_optimizer.py -k bias",
        [('update_rate": moe.expert_bias_update_rate', 'update_rate": -moe.expert_bias_update_rate')],
    ),
    (
        "router",
        "llada_moe/model/transformer.py",
        "tests/llada_moe/model/test_routing.py -k definition",
        [('scaling_factor": moe.routed_scaling_factor', 'scaling_factor": 1.0')],
    ),
    (
        "router",
        "llada_moe/model/transformer.py",
        "tests/llada_moe/huggingface/test_formats.py -k logits",
        [
            ('pre_softmax": moe.score_function == "softmax"', 'pre_softmax": False'),
            ("int(layer >= moe.leading_dense_layers)", "int(layer > moe.leading_dense_layers)"),
        ],
    ),
    (
        "router",
        "llada_moe/model/experts.py",
        "tests/llada_moe/model/test_experts.py",
        [
            ("torch.sum(d_scaled * product,", "torch.sum(d_scaled * active,"),
            ("if count else torch.zeros_like", "if count else torch.ones_like"),
        ],
    ),
    (
        "router",
        "llada_moe/model/experts.py",
        "tests/llada_moe/model/test_layer.py -k softmax",
        [("silu(gate).mul_(up).mul_(probs.unsqueeze(-1).to(x.dtype))", "silu(gate).mul_(up)")],
    ),
    (
        "experts",
        "llada_moe/model/grouped.py",
        "tests/llada_moe/model/test_grouped.py",
        [
            ("torch.sum(d_scaled * product,", "torch.sum(d_scaled * active,"),
            ("dy.t(), product.mul_(scale), ends", "dy.t(), product, ends"),
            ("or distance < first.numel()", "or False"),
            ("product if b.dim() == 3 else _zero_without_rows(product, ends)", "product"),
            ("in reversed(list(enumerate(modules)))", "in list(enumerate(modules))"),
            ("and not _quantized(weight) for", "for"),
        ],
    ),
    (
        "experts",
        "llada_moe/model/layer.py",
        "tests/llada_moe/model/test_grouped.py",
        [
            ("order // top_k", "order % tokens.size(0)"),
            (".view(-1, top_k, tokens.size(-1)).sum(dim=1)", ".view(-1, top_k, tokens.size(-1)).mean(dim=1)"),
        ],
    ),
    (
        "kernels",
        "parallel/fusions.py",
        "tests/parallel/test_fusions.py",
        [
            ("engine and training", "engine"),
            ("engine and model.moe.expert_capacity == 0", "engine"),
        ],
    ),
    (
        "kernels",
        "llada_moe/model/accelerations.py",
        "tests/llada_moe/model/test_accelerations.py",
        [
            ("Version(version) < OLDEST_WHOLE_TRANSFORMER_ENGINE", "False"),
            ("    if not engine:\n", "    if False:\n"),
            ("        for name in [name for name in sys.modules if", "        for name in [name for name in () if"),
        ],
    ),
    (
        "optimizer",
        "parallel/training/distributed_optimizer.py",
        "tests/parallel/training/test_optimizer.py -k numbers",
        [
            ("adam_beta2=settings.beta2", "adam_beta2=0.95"),
            ("adam_eps=settings.epsilon", "adam_eps=1e-8"),
            ('weight_decay * group["wd_mult"]', "weight_decay"),
            ('group["lr"] = rate', 'group["lr"] = rate / 2'),
        ],
    ),
    (
        "optimizer",
        "parallel/training/distributed_optimizer.py",
        "tests/parallel/training/recovery/test_recovery.py -k update_after_the_verdict",
        [("max_norm=part.config.clip_grad,", "max_norm=1e9,")],
    ),
    (
        "optimizer",
        "llada_moe/config/optimizer.py",
        "tests/llada_moe/config/test_learning_rate.py",
        [
            ("config.peak * (step + 1) / config.warmup_steps", "config.peak * step / config.warmup_steps"),
            ("min((step - decay_start + 1) /", "min((step - decay_start) /"),
            ("reversed(config.drops) if drop.step <= step", "reversed(config.drops) if drop.step < step"),
            ("(1 + math.cos(math.pi * done)) / 2", "(1 - math.cos(math.pi * done)) / 2"),
            ("rate.decay_steps * steps // before, min(rate.decay_steps, 1)", "rate.decay_steps * steps // before, 0"),
            ("drop.step < decay_start for drop", "drop.step <= decay_start for drop"),
        ],
    ),
    (
        "checkpoint",
        "parallel/checkpoint/manifest.py",
        "tests/parallel/checkpoint/test_manifest.py",
        [
            ("    if extra:\n", "    if False:\n"),
            ("if found.sha256 != stated.sha256:", "if False:"),
            ("is_whole = stated == _self_digest(body)", "is_whole = stated is not None"),
            ("if match and entry.is_dir()), reverse=True)", "if match and entry.is_dir()))"),
            ('or "/" in name or', "or"),
        ],
    ),
    (
        "checkpoint",
        "parallel/checkpoint/retention.py",
        "tests/parallel/checkpoint/test_store.py tests/parallel/checkpoint/test_saving.py "
        "-k 'last_ones or multiples or puts_the_old or newest_whole or damaged_checkpoints'",
        [
            ("[: self.keep_last]", "[: self.keep_last + 1]"),
            ("step % self.keep_every == 0", "step % self.keep_every != 0"),
            ("if target.exists():\n                remove(path)", "if True:\n                remove(path)"),
        ],
    ),
    (
        "checkpoint",
        "parallel/checkpoint/retention.py",
        "tests/parallel/checkpoint/test_retention.py",
        [("if fault(path) is None]", "if True]")],
    ),
    (
        "checkpoint",
        "parallel/checkpoint/safety.py",
        "tests/parallel/checkpoint/test_safety.py",
        [
            ("return _ALLOWED[(module, name)]", "return super().find_class(module, name)"),
            ("or place.relative_path not in files", "or False"),
        ],
    ),
    (
        "resume",
        "parallel/training/state.py",
        "tests/parallel/checkpoint/test_earlier_versions.py",
        [('self.step = int(metadata["step"])', 'self.step = int(metadata["step"]) + 1')],
    ),
    (
        "resume",
        "parallel/training/state.py",
        "tests/parallel/checkpoint/test_resume.py -k 'bit_for_bit and once'",
        [
            ('load_optimizer_state(self.optimizer, model_state(self.chunks), state["optimizer"])', "pass"),
            ("load_model_state(self.chunks, state)\n        load_optimizer_state", "load_optimizer_state"),
        ],
    ),
    (
        "resume",
        "parallel/training/state.py",
        "tests/parallel/test_fp8_state.py -k resumed",
        [("fp8_state.load_scaling_state(self.chunks, state[fp8_state.KEY])", "pass")],
    ),
    (
        "resume",
        "parallel/training/recovery/repair.py",
        "tests/parallel/test_fp8_state.py -k again",
        [(", *fp8_state.scaling_tensors(models)", "")],
    ),
    (
        "resume",
        "parallel/training/validation.py",
        "tests/parallel/test_fp8_state.py -k again",
        [("with fp8_state.unchanged(models):", "if True:")],
    ),
    (
        "resume",
        "parallel/fp8_weights.py",
        "tests/parallel/test_fp8_weights.py -k initialised",
        [("weight.get_high_precision_init_val().copy_(plain)", "pass")],
    ),
    (
        "resume",
        "parallel/training/state.py",
        "tests/parallel/training/test_objectives.py -k trains_validates",
        [('self.objective.load_state(metadata.get("objective", {}))', "pass")],
    ),
    (
        "resume",
        "parallel/training/state.py",
        "tests/parallel/training/recovery/test_recovery.py -k going_back_is",
        [("self.history.learn(known)", "pass")],
    ),
    (
        "resume",
        "parallel/training/distributed_optimizer.py",
        "tests/parallel/checkpoint/test_resume.py -k 'bit_for_bit and once'",
        [('group["step"] = state["updates"]', 'group["step"] = 0')],
    ),
    (
        "editors",
        "llada_moe/sampling/editors/levenshtein.py",
        "tests/llada_moe/sampling/editors/test_levenshtein.py tests/llada_moe/sampling/editors/test_termination.py",
        [
            ("torch.where(initial.any(1), others + 1,", "torch.where(initial.any(1), others,"),
            ("history.post_steps >= self._settings.", "history.post_steps > self._settings."),
            ("[(0, True, False), (old[0], old[1], False)]", "[(old[0], old[1], False), (0, True, False)]"),
            ("            states[state] += 1\n", ""),
            ("key=lambda c: float(statistics.confidence", "key=lambda c: -float(statistics.confidence"),
            ("cells + [(0, True, False)] * (end - start)", "[(0, True, False)] * (end - start - len(cells)) + cells"),
            ("statistics.confidence > self._settings.", "statistics.confidence >= self._settings."),
        ],
    ),
    (
        "editors",
        "llada_moe/sampling/editors/token_editing.py",
        "tests/llada_moe/sampling/editors/test_tokens.py",
        [
            ("post >= self._settings.max_post_steps", "post > self._settings.max_post_steps"),
            ("written = chosen | replaced", "written = chosen"),
            ("torch.where(block.step_in_block == 0, 0, self._post[block.slot])", "self._post[block.slot]"),
            ("settled = ~written.any(1) |", "settled ="),
        ],
    ),
    (
        "editors",
        "llada_moe/sampling/editors/wino.py",
        "tests/llada_moe/sampling/editors/test_wino.py",
        [
            ("doubted, before - 1)", "doubted, before - 2)"),
            ("(committed > 1)[:, None]", "(committed > 0)[:, None]"),
            ("best(-statistics.current,", "best(statistics.current,"),
            (".clamp(self.least, self.most)", ".clamp(1, self.most)"),
        ],
    ),
    (
        "conversion",
        "parallel/checkpoint/conversion/placement.py",
        "tests/parallel/checkpoint/test_placement.py",
        [
            ("yield length + start, length + stop, slice(None)", "yield start, stop, slice(None)"),
            ('("linear_proj.weight", "linear_fc2.weight")', '("linear_proj.weight",)'),
            ("first + index[0] // size * layout.expert_tensor_parallel", "first + index[0] // size"),
            ("return 0 if key == _EMBEDDING else stages - 1", "return 0"),
        ],
    ),
    (
        "conversion",
        "llada_moe/huggingface/mapping.py",
        "tests/llada_moe/huggingface/test_formats.py -k 'inverse or logits'",
        [
            ("part.reshape(groups, -1, concatenated", "part.reshape(1, -1, concatenated"),
            ("return torch.cat([part.reshape(-1, width) for part in grouped])", "return interleaved"),
            ("        first += count\n", ""),
        ],
    ),
    (
        "conversion",
        "llada_moe/huggingface/safetensors_header.py",
        "tests/llada_moe/huggingface/test_safetensors_refusals.py "
        "tests/llada_moe/huggingface/test_safetensors_files.py",
        [
            ('"BF16": torch.bfloat16', '"BF16": torch.float16'),
            ("    _check_contiguous(path, tensors, start, end)\n", ""),
            ("if length > MAX_JSON_BYTES:", "if False:"),
        ],
    ),
    (
        "recovery",
        "parallel/training/recovery/policy.py",
        "tests/parallel/training/recovery/test_policy.py",
        [
            ("above <= config.spike_threshold", "above < config.spike_threshold"),
            ("config.spike_window // 2", "config.spike_window // 3"),
            ("max(back_to, fault.step - config.skip_steps)", "fault.step - config.skip_steps"),
            ("step > d.back_to)", "step >= d.back_to)"),
            ("history.counted >= config.max_decisions", "history.counted > config.max_decisions"),
            ("math.isfinite(loss) and math.isfinite(grad_norm)", "math.isfinite(loss) or math.isfinite(grad_norm)"),
            ("retries >= RETRIES_PER_DECISION", "retries > RETRIES_PER_DECISION"),
            ("/ len(window)\n    return (loss - mean)", "/ (len(window) - 1)\n    return (loss - mean)"),
        ],
    ),
    (
        "recovery",
        "parallel/training/recovery/attempt.py",
        "tests/parallel/training/recovery/test_attempt.py",
        [
            ("math.nan if not_finite else grad_norm", "grad_norm"),
            ("return loss / self._run.layout.tensor_parallel,", "return loss,"),
        ],
    ),
    (
        "recovery",
        "parallel/training/recovery/attempt.py",
        "tests/parallel/training/recovery/test_recovery.py -k passing_fault",
        [("            return first\n        self._snapshot.restore()\n", "            return first\n")],
    ),
    (
        "hang",
        "launch/ranks/hang.py",
        "tests/launch/test_hang.py",
        [
            ("statistics.median(self._durations)", "min(self._durations)"),
            ("statistics.median(self._durations)", "statistics.mean(self._durations)"),
            ('phases != {"step"}', '"step" not in phases'),
            ("self.steps < _STEPS_FOR_A_MEDIAN", "self.steps < 0"),
            ("max(self._limits.hang_minimum_s,", "min(self._limits.hang_minimum_s,"),
            ("if now - self._looked > _SUSPENDED_S:", "if False:"),
            ("fewest = min(each.step", "fewest = max(each.step"),
        ],
    ),
    (
        "hang",
        "launch/run_lock.py",
        "tests/launch/test_run_lock.py",
        [
            ("(self.host, self.machine) == (socket.gethostname(), _machine())", "self.host == socket.gethostname()"),
            ("return same and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE", "return same"),
            ("_time_there(path) - renewed > STALE_S", "_time_there(path) - renewed > 2 * STALE_S"),
            ("return job_id is not None and holder.job_id == job_id", "return holder.job_id == job_id"),
        ],
    ),
]


def mutants() -> Iterator[Mutant]:
    """All of them, area by area."""
    for area, file, tests, changes in _GROUPS:
        for old, new in changes:
            yield Mutant(area, file, old, new, tuple(shlex.split(tests)))
