"""What a run needs before it starts: parameters, memory, messages and time of a plan, and its search."""

from __future__ import annotations

from benchmarks.mutant_groups.of_the_model import Group

PLANNING = "llada_moe/planning"
TESTS = "tests/llada_moe/planning"

GROUPS: list[Group] = [
    (
        "planner",
        f"{PLANNING}/held_parameters.py",
        f"{TESTS}/test_planned_memory.py",
        [
            ("stack.experts // layout.expert_parallel * one", "stack.experts * one"),
            ("copies = (workload.dense_copies, workload.expert_copies)", "copies = (workload.dense_copies,) * 2"),
            ("tables = first + (last and not (first and stack.tied))", "tables = first"),
            ('"gradients": widths.gradient * count,', '"gradients": widths.gradient * shards,'),
            ("math.ceil(count / math.lcm(ranks, 2 * ALIGNED))", "math.floor(count / math.lcm(ranks, 2 * ALIGNED))"),
        ],
    ),
    (
        "planner",
        f"{PLANNING}/activations.py",
        f"{TESTS}/test_planned_memory.py",
        [
            ("min(workload.micro_batches, stages - stage)", "min(workload.micro_batches, stages)"),
            ("(2 * (stages - stage - 1) + (chunks - 1) * stages + 1 + extra) / chunks", "stages - stage"),
            ('matrices = stack.matrices - 1 if "moe_act" in workload.modules', "matrices = stack.matrices if False"),
            ("shards = workload.layout.context_parallel if workload.gathered_keys else 1", "shards = 1"),
        ],
    ),
    (
        "planner",
        f"{PLANNING}/workload.py",
        f"{TESTS}/test_planned_memory.py {TESTS}/test_expert_loads.py",
        [
            ("return self.layout.data_parallel * self.layout.context_parallel", "return self.layout.data_parallel"),
            ("if self.layout.expert_parallel == 1:", "if False:"),
            ("self.layer_imbalance[layer] if self.layer_imbalance else", ""),
        ],
    ),
    (
        "planner",
        f"{PLANNING}/expert_loads.py",
        f"{TESTS}/test_expert_loads.py",
        [
            ("by_layer.get(layer + 1, ())", "by_layer.get(layer, ())"),
            ("max(rows) * ranks / sum(rows)", "max(rows) / sum(rows)"),
            ("sum(tokens[first : first + size])", "sum(tokens[first::ranks])"),
            ("    if layers != wanted:\n", "    if False:\n"),
            ("(own := _own(model, key)) != found", "(own := found) != found"),
        ],
    ),
    (
        "planner",
        f"{PLANNING}/traffic.py",
        f"{TESTS}/test_planned_traffic.py",
        [
            ("TENSOR_FORWARD, TENSOR_BACKWARD = 2, 3", "TENSOR_FORWARD, TENSOR_BACKWARD = 2, 2"),
            (
                'if workload.recompute == "full" or "moe" in workload.modules else 4',
                'if workload.recompute == "full" else 4',
            ),
            ("forwards = chunks - (stage == last)", "forwards = chunks"),
            ("return (ranks - near) / (ranks - 1)", "return (ranks - near) / ranks"),
        ],
    ),
    (
        "planner",
        f"{PLANNING}/step_time.py",
        f"{TESTS}/test_planned_time.py",
        [
            ("slowest = max(stages, key=_total)", "slowest = min(stages, key=_total)"),
            ("bubbles / layout.pipeline_chunks_per_rank * mean", "workload.micro_batches * bubbles * mean"),
            ("outside *= min(1.0, visited / workload.stack.top_k)", "pass"),
            ("layout.overlap_grad_reduce * micro_batch * 2 / 3", "0"),
        ],
    ),
    (
        "planner",
        f"{PLANNING}/layout_search.py",
        f"{TESTS}/test_layout_search.py",
        [
            ("key=lambda each: each.time.total)", "key=lambda each: -each.time.total)"),
            ("        if other.fits:\n", "        if True:\n"),
            (
                '        raise ConfigError(f"--gpus {gpus}: with layout.data_parallel',
                '        return run\n        raise ConfigError(f"--gpus {gpus}: with layout.data_parallel',
            ),
        ],
    ),
    (
        "planner",
        f"{PLANNING}/timeline.py",
        f"{TESTS}/test_timeline.py",
        [
            ("min(stages - stage - 1, micro_batches)", "min(stages - 1, micro_batches)"),
            ("start = max(free[stage], ready)", "start = free[stage]"),
        ],
    ),
]
