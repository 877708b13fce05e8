"""What lives longer than a step: checkpoints, resumed runs, edited samples, conversions, recovery, hangs."""

from __future__ import annotations

from benchmarks.mutant_groups.of_the_model import Group

GROUPS: list[Group] = [
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
        "tests/parallel/fp8/test_fp8_state.py -k resumed",
        [("fp8_state.load_scaling_state(self.chunks, state[fp8_state.KEY])", "pass")],
    ),
    (
        "resume",
        "parallel/training/recovery/repair.py",
        "tests/parallel/fp8/test_fp8_state.py -k again",
        [(", *fp8_state.scaling_tensors(models)", "")],
    ),
    (
        "resume",
        "parallel/training/validation.py",
        "tests/parallel/fp8/test_fp8_state.py -k again",
        [("with fp8_state.unchanged(models):", "if True:")],
    ),
    (
        "resume",
        "parallel/fp8/fp8_weights.py",
        "tests/parallel/fp8/test_fp8_weights.py -k initialised",
        [("weight.get_high_precision_init_val().copy_(values.detach())", "pass")],
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
            ("(value / self._run.layout.tensor_parallel for value in sums)", "sums"),
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
