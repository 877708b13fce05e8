"""What is computed: noise, objectives, attention, routing, experts, kernels, the update."""

from __future__ import annotations

Group = tuple[str, str, str, list[tuple[str, str]]]
"""Area, file in `src/llada_megatron`, words of a pytest command line, and changes of one line: old and new text."""

GROUPS: list[Group] = [
    (
        "noise",
        "llada_moe/diffusion/noise.py",
        "tests/llada_moe/diffusion/test_noise.py",
        [
            ("return (1.0 - self._epsilon) * t + self._least", "return t"),
            ("(~drawn, 1.0 - ratios)", "(~drawn, ratios)"),
            ("objective.epsilon / 2 if pairs", "objective.epsilon if pairs"),
            ("global_batch_size // 2 if pairs", "global_batch_size if pairs"),
            ("mask[untruncated:] = False", "pass"),
            ("< ratio) & ~mask", "< ratio)"),
            ("return 1 + int(size * length)", "return int(size * length)"),
            ("[0, stream, at.epoch, at.window]", "[0, stream, 0, at.window]"),
            ("_SUBSTITUTE, _ORDER = range(7)", "_SUBSTITUTE, _ORDER = 0, 1, 2, 3, 1, 5, 6"),
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
            ("np.where(noise.mask, weights, np.float32(shown_weight))[: noise.length]", "weights[: noise.length]"),
            ("whole_range and not self.config.trains_editing and", "whole_range and"),
            ('self.config.normalization == "all_tokens"', "True"),
            ("return not self.config.trains_editing", "return True"),
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
            ("(value / run.layout.tensor_parallel for value in sums.tolist())", "sums.tolist()"),
            ("batch.weights[surplus], batch.untruncated[surplus] = 0.0, 0", "batch.untruncated[surplus] = 0"),
        ],
    ),
    (
        "objective",
        "llada_moe/objectives/fine_tuning.py",
        "tests/llada_moe/objectives/test_fine_tuning.py",
        [
            ("answer & drawn.mask", "drawn.mask"),
            ('train and self.config.weighting == "none"', 'self.config.weighting == "none"'),
            ("max(1, int(answer.sum())) if per_answer else 1", "1"),
        ],
    ),
    (
        "objective",
        "llada_moe/data/chat_samples.py",
        "tests/llada_moe/objectives/test_fine_tuning.py",
        [
            ("at.set, at.epoch, document, at.inverse)", "at.set, at.epoch, document)"),
            ("stop = int(spans[0, 1])", "pass"),
            ("answer[-1] = True", "pass"),
            ("constant_values=True)", "constant_values=False)"),
            ("return documents[first < self._window]", "return documents"),
        ],
    ),
    (
        "objective",
        "llada_moe/model/confidence.py",
        "tests/llada_moe/model/test_confidence.py",
        [
            ("right = of_label == 0", "right = of_label <= 0"),
            ("-chances * (logs + entropy[:, None])", "-chances * logs"),
        ],
    ),
    (
        "objective",
        "llada_moe/model/confidence.py",
        "tests/parallel/training/test_fine_tuning_parity.py -k TP2",
        [
            ("distributed.ReduceOp.SUM, group)", "distributed.ReduceOp.MAX, group)"),
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
        [("held_runs(key.size(0), self.context_group.rank(),", "held_runs(key.size(0), 0,")],
    ),
    (
        "attention",
        "llada_moe/model/attention/decomposed.py",
        "tests/llada_moe/model/attention/test_doubled.py",
        [
            ("torch.cat([mine == keys, mine > keys], dim=1)", "torch.cat([mine == keys, mine >= keys], dim=1)"),
            ("// block)[:, None] >= keys", "// block)[:, None] > keys"),
            ("total = torch.logaddexp(lse, before_lse)", "total = torch.maximum(lse, before_lse)"),
            ("whole[:, :, where] += piece", "whole[:, :, where] = piece"),
            ("mine += _part_gradients(", "mine[:] = _part_gradients("),
            (
                "first in range(keys.start, keys.stop, KEYS_AT_ONCE)",
                "first in range(keys.start, keys.stop, 2 * KEYS_AT_ONCE)",
            ),
            ("mask.repeat(q.size(1) // k.size(1), 1)", "mask.repeat_interleave(q.size(1) // k.size(1), 0)"),
            ("if len(set(packed.rows)) == 1:", "if True:"),
            ("found, sums, 0.0, False, attn_mask=mask, scale=scale", "found, sums, 0.0, False, attn_mask=mask"),
            ("index_select(2, order.argsort().to(q.device))", "index_select(2, order.to(q.device))"),
        ],
    ),
    (
        "attention",
        "llada_moe/model/attention/doubled_documents.py",
        "tests/llada_moe/model/attention/test_doubled.py tests/llada_moe/model/attention/test_flex.py",
        [
            ("np.minimum(first + block, stop)", "first + block"),
            ("span = size * max(1, CHUNK_QUERIES // size)", "span = size"),
            ("chunk.stop, self.clean_block)", "chunk.stop, block)"),
            ("row += run.stop - run.start", "pass"),
            ("if noisy != clean or not noisy", "if not noisy"),
        ],
    ),
    (
        "attention",
        "llada_moe/model/context_slices.py",
        "tests/llada_moe/model/test_context_slices.py",
        [
            ("pieces = (rank, 2 * ranks - 1 - rank)", "pieces = (2 * rank, 2 * rank + 1)"),
            ("key=lambda number: runs[number]", "key=lambda number: number"),
        ],
    ),
    (
        "objective",
        "llada_moe/objectives/block_diffusion.py",
        "tests/llada_moe/objectives/test_block_diffusion.py tests/llada_moe/config/test_block_schedule.py",
        [
            ("if self.block_size(step) < len(tokens) else row", "if True else row"),
            ('and split == "train"\n', "\n"),
            ("block_size >= self.training.sequence_length", "block_size > self.training.sequence_length"),
            ("max(step - 1, 0)", "step"),
        ],
    ),
    (
        "experts",
        "llada_moe/model/layer.py",
        "tests/llada_moe/model/test_layer.py",
        [("routing_map = routing_map.clone()", "pass")],
    ),
    (
        "objective",
        "llada_moe/objectives/block_rows.py",
        "tests/llada_moe/objectives/test_block_diffusion.py",
        [
            ("noisy.boundaries[1:] + np.int32(length)", "noisy.boundaries[1:]"),
            ("counts = -(-lengths // size)", "counts = lengths // size"),
        ],
    ),
    (
        "objective",
        "llada_moe/objectives/joint.py",
        "tests/llada_moe/objectives/test_joint.py",
        [
            ("np.arange(length) < noisy.untruncated", "np.arange(length) >= 0"),
            ("of_noisy = of_clean = 1.0", "of_noisy = 1.0"),
            ("causal_clean=True", "causal_clean=False"),
        ],
    ),
    (
        "sampling",
        "llada_moe/sampling/speculation.py",
        "tests/llada_moe/sampling/test_speculation.py",
        [
            ("text.kept = text.known + len(news) - 1", "text.kept = text.known + len(news)"),
            ("news[-1].token == text.draft[len(news) - 1]", "True"),
            ("torch.zeros_like(slot), tokens[places]", "slot + 1, tokens[places]"),
            ("low + place + 1 < text.length", "True"),
            ("stops[0] + 1", "stops[0]"),
        ],
    ),
    (
        "objective",
        "llada_moe/model/transformer.py",
        "tests/llada_moe/objectives/test_block_diffusion.py",
        [
            (
                "if copies > 1:\n            angles =",
                "if copies > 1:\n            angles = self.get_emb(max_seq_len) if True else",
            )
        ],
    ),
    (
        "attention",
        "llada_moe/model/attention/window_attention.py",
        "tests/llada_moe/model/test_windows.py",
        [("torch.arange(window.shadow_first, window.shadow_first + window.shadows,", "torch.arange(window.shadows,")],
    ),
    (
        "attention",
        "llada_moe/model/attention/packed_documents.py",
        " ".join(f"tests/llada_moe/model/attention/test_{name}.py" for name in ("against_softmax", "backends", "flex")),
        [
            ("np.arange(part.before, part.before + part.queries) // block", "np.arange(part.queries) // block"),
            ("keys = pattern.keys_seen(stop - segment.start,", "keys = pattern.keys_seen(stop - start,"),
            ("first_key = segment.start", "first_key = 0"),
            ("self.once(boundaries, (pattern, batch,", "self.once(boundaries, (batch,"),
        ],
    ),
    (
        "attention",
        "llada_moe/model/last_batches.py",
        "tests/llada_moe/model/attention/test_backends.py -k batch",
        [("if len(self._made) == self._kept:", "if False:"), ("self._made.move_to_end(key)", "pass")],
    ),
    (
        "attention",
        "llada_moe/model/attention/flex.py",
        "tests/llada_moe/model/attention/test_flex.py",
        [
            ("(ends > edges) & (begins < ends)", "(ends > edges)"),
            ("packed.once(block_mask, query.device)", "block_mask(packed, query.device)"),
            ("(ends >= edges + TILE)", "(ends >= edges)"),
            ("(begins[b, q] <= k) & (k < ends[b, q])", "k < ends[b, q]"),
            ("_ordered(some & ~whole, device)", "_ordered(some, device)"),
        ],
    ),
    (
        "attention",
        "llada_moe/model/compiled.py",
        "tests/llada_moe/model/attention/test_flex.py -k compiled",
        [(", fullgraph=True", ""), ("types.FunctionType(own,", "types.FunctionType(call.__code__,")],
    ),
    (
        "attention",
        "llada_moe/model/attention/backends.py",
        "tests/llada_moe/model/attention/test_backends.py -k gpu",
        [("return _too_old(name, (9, 0)) or", "return"), ("(_capability() or (9, 0))[0] == 9", "True")],
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
            ("[place * seq : (place + 1) * seq]", "[:seq]"),
            ("facts = self.pattern, self.block_size,", "facts = self.block_size,"),
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
            ("return product * scale, d_both", "return product, d_both"),
            ("product.masked_fill(empty[:, None, None], 0)", "product"),
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
            ("places = order // top_k", "places = order % tokens.size(0)"),
            ("tokens.index_select(0, order // top_k)", "tokens.index_select(0, order % tokens.size(0))"),
            ("experts.flatten().argsort(stable=True)", "experts.flatten().argsort(stable=True, descending=True)"),
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
        "parallel/training/distributed_optimizer.py",
        "tests/parallel/training/test_step_host_waits.py -k PP2",
        [("get_total_norm(gradients).square()", "get_total_norm(gradients)"), ("or not squares.is_cuda", "or True")],
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
]
