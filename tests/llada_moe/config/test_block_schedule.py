"""Block sizes over a run: which step has which, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llada_megatron.llada_moe.config import from_dict, load_run, to_dict
from llada_megatron.llada_moe.config.block_schedule import BlockSchedule, BlockStage
from llada_megatron.llada_moe.config.editing import EditingConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model.patterns import CAUSAL, FULL, AttentionPattern
from llada_megatron.llada_moe.objectives import make_objective

RUN = """\
model: tiny-dense
training:
  steps: 12
  sequence_length: 64
  global_batch_size: 2
objective:
  kind: block_diffusion
  block_size: 8
  block_schedule:
    warmup:
      - {block_size: 1, tokens: 256}
      - {block_size: 4, tokens: 300}
    stable: {block_size: 64, tokens: 340}
    decay:
      - {block_size: 32, tokens: 256}
      - {block_size: 8, tokens: 384}
validation:
  interval: 2
  sequences: 2
data:
  sets:
    - path: data/a
optimizer:
  learning_rate:
    peak: 1e-3
output_dir: runs/x
"""


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path


def test_a_stage_ends_with_the_step_that_completes_its_tokens(run_file):
    run = load_run(run_file)
    learnt = make_objective(run.objective, run.training)
    # 128 tokens a step; 256, 556, 896, 1152 and 1536 tokens are done after steps 2, 5, 7, 9 and 12
    assert [learnt.block_size(step) for step in range(14)] == [1, 1, 4, 4, 4, 64, 64, 32, 32, 8, 8, 8, 8, 8]
    assert learnt.pattern(4) == AttentionPattern(4, doubled=True) and learnt.state() == {}
    learnt.step = 4
    assert learnt.state() == {"stage": 1, "block_size": 4}
    assert learnt.sampling_pattern(5) == AttentionPattern(4)  # the model of step 5 has not been trained with more
    assert learnt.pattern(5) == learnt.sampling_pattern(6) == FULL
    again = make_objective(run.objective, run.training)
    again.load_state({"stage": 1, "block_size": 4})
    assert again.sampling_pattern(5) == AttentionPattern(4)
    assert from_dict(RunConfig, to_dict(run)) == run
    assert "blocks of 1, then 4, then 64, then 32, then 8" in learnt.description()


FIRST = ["objective.block_schedule.autoregressive_tokens=250", "training.steps=14"]
"""Two steps, the second of which completes 250 tokens; 250, 506, 806, … tokens are done after steps 2, 4, 7, …"""


def test_next_tokens_before_the_first_stage(run_file):
    noise = ["objective.mask_embedding_noise=0.5", "objective.mask_embedding_noise_steps=2"]
    run = load_run(run_file, [*FIRST, *noise])
    learnt = make_objective(run.objective, run.training)
    assert [learnt.block_size(step) for step in range(14)] == [1, 1, 1, 1, 4, 4, 4, 64, 64, 32, 32, 8, 8, 8][:14]
    assert learnt.pattern(1) == learnt.sampling_pattern(2) == CAUSAL
    assert learnt.pattern(2) == AttentionPattern(1, doubled=True)
    assert [learnt.embedding_noise(step) for step in range(5)] == [0.0, 0.0, 0.5, 0.25, 0.0]
    drafting = replace(run.objective, editing=EditingConfig(share=1.0, draft_share=1.0))
    assert [make_objective(drafting, run.training).writes_drafts(step) for step in (0, 1, 2)] == [False, False, True]
    learnt.step = 1
    assert not learnt.only_masks_supervised and learnt.state() == {"autoregressive": True, "block_size": 1}
    again = make_objective(run.objective, run.training)
    again.load_state(learnt.state())
    assert not again.fills_masks and again.sampling_pattern(2) == CAUSAL
    learnt.step = 2
    assert learnt.only_masks_supervised and learnt.fills_masks and learnt.state() == {"stage": 0, "block_size": 1}
    assert "next tokens, then block diffusion in blocks of 1, then 4" in learnt.description()


def test_the_published_schedule():
    sizes = ((1, 4, 32, 64), 4096, (2048, 1024, 512, 256, 128, 64, 32))
    schedule = BlockSchedule(
        warmup=[BlockStage(block_size=size, tokens=2**22) for size in sizes[0]],
        stable=BlockStage(block_size=sizes[1], tokens=2**24),
        decay=[BlockStage(block_size=size, tokens=2**22) for size in sizes[2]],
    )
    ends = schedule.ends(TrainingConfig(steps=1, sequence_length=4096, global_batch_size=64).sequence_length * 64)
    assert ends == [16, 32, 48, 64, 128, 144, 160, 176, 192, 208, 224, 240]


STAGES = "objective.block_schedule"
REFUSED = {
    "length": ("training.sequence_length=62", "objective.block_schedule.warmup.1.block_size: 4 does not divide"),
    "longer": (
        f"{STAGES}.stable.block_size=128",
        "objective.block_schedule.stable.block_size: 128 does not divide training.sequence_length 64; use 64",
    ),
    "steps": (
        "training.steps=20",
        "20 steps of 128 tokens are 2560, but the stages of objective.block_schedule are 1536 tokens; set "
        "training.steps=12",
    ),
    "validation": (
        "validation.interval=4",
        "objective.block_schedule.warmup.0.tokens: the stage is steps 1 to 2, and with validation.interval 4 none of "
        "them is validated; set validation.interval=2 or less",
    ),
    "no validation": ("validation.interval=0", "validation.interval: 0, but every stage of"),
    "up": (f"{STAGES}.warmup.1.block_size=1", "block sizes 1, 1, 64, the last of the stable stage, do not grow"),
    "down": (f"{STAGES}.decay.0.block_size=64", "block sizes 64, 64, 8, the first of the stable stage, do not shrink"),
    "ends above": (f"{STAGES}.decay.1.block_size=48", "block sizes 64, 32, 48, the first of the stable stage, do not"),
    "last": ("objective.block_size=4", "4, but the schedule ends with blocks of 8: a model writes in blocks"),
    "nothing": (f"{STAGES}.stable.block_size=0", "objective.block_schedule.stable.block_size: 0 must be at least 1"),
    "no tokens": (f"{STAGES}.decay.0.tokens=0", "objective.block_schedule.decay.0.tokens: 0 must be at least 1"),
    "replaced": (
        "objective.replace_ratio=0.1",
        "0.1 with kind block_diffusion, which has a section for it: objective.",
    ),
    "editing": ("objective.editing.share=1.5", "objective.editing.share: 1.5 must lie between 0 and 1"),
    "no noise": ("objective.editing.replace_ratio=0", "objective.editing.share: 0.5 without a wrong token; give a"),
    "ratio": ("objective.editing.surplus_ratio=1", "objective.editing.surplus_ratio: 1.0 must be at least 0 and less"),
    "weight": ("objective.editing.weight=0", "objective.editing.weight: 0.0 must be greater than 0"),
    "operations": (
        "objective.editing.missing_ratio=0.1",
        "0.1, but the model has no delete_token_id and insert_token_id",
    ),
    "answers": ("objective.normalization=answer_length", "prepared text has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_up_front(run_file, case):
    override, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        load_run(run_file, [override])
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 5


def test_text_does_not_move_where_one_block_is_the_whole_window(run_file):
    """The stable stage's, also where the model has the operations; a model without a mask cannot be trained at all."""
    operations = ["model.delete_token_id=7", "model.insert_token_id=8"]
    with pytest.raises(ConfigError, match=r"objective\.editing\.surplus_ratio: 0\.1 with a block of 64: text moves"):
        load_run(run_file, ["objective.editing.surplus_ratio=0.1", *operations])
    with pytest.raises(ConfigError, match=r"model\.mask_token_id: -1 is outside the vocabulary"):
        load_run(run_file, ["objective.editing.share=0.5", "model.mask_token_id=-1"])
    assert load_run(run_file, ["objective.editing.share=0.25"]).objective.editing.replace_ratio == 0.1


def test_no_stage_lets_a_token_be_routed_by_those_it_has_to_predict(run_file):
    """The check of the last stage's size alone would pass the small ones before it."""
    with pytest.raises(ConfigError) as caught:
        load_run(run_file, ["model=llada2.2-mini", "model.moe.routing_block_size=8"])
    said = str(caught.value)
    assert f"{STAGES}.warmup.0.block_size: 1 is not a multiple of model.moe.routing_block_size 8: tokens would" in said
    assert f"{STAGES}.stable.block_size" not in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{STAGES}.autoregressive_tokens=-1"], "autoregressive_tokens: -1 must not be negative; 0 = none"),
        (FIRST[:1], "objective.block_schedule are 1786 tokens; set training.steps=14"),
        (
            [f"{STAGES}.autoregressive_tokens=128", "training.steps=13"],
            f"{STAGES}.autoregressive_tokens: the stage is steps 1 to 1, and with validation.interval 2 none of",
        ),
        (
            [*FIRST, "objective.complementary_masks=true"],
            "objective.complementary_masks: true with block_schedule.autoregressive_tokens, whose steps mask no token",
        ),
        (
            [*FIRST, "model=llada2.2-mini", "model.moe.routing_block_size=8"],
            f"{STAGES}.autoregressive_tokens: 250 with model.moe.routing_block_size 8: tokens would be routed by later",
        ),
    ],
)
def test_next_tokens_that_cannot_work_are_refused(run_file, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_run(run_file, overrides)
    assert message in str(caught.value)


def test_a_stage_without_a_step_is_refused(run_file):
    tokens = {"warmup.0": 250, "warmup.1": 4, "stable": 258}  # the first stage's last step completes the second
    overrides = [f"{STAGES}.{name}.tokens={count}" for name, count in tokens.items()]
    with pytest.raises(ConfigError, match=r"warmup\.1\.tokens: 4 is less than a step, and no step is left for it"):
        load_run(run_file, [*overrides, "training.steps=9", "validation.interval=1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([f"{STAGES}=null", "objective.block_size=null"], "objective.block_size: null, but kind block_diffusion needs"),
        ([f"{STAGES}=null", "objective.block_size=24"], "24 does not divide training.sequence_length 64; use 16"),
        ([f"{STAGES}=null", "objective.block_size=0"], "objective.block_size: 0, but kind block_diffusion needs"),
    ],
)
def test_one_block_size_for_the_whole_run(run_file, changes, message):
    with pytest.raises(ConfigError) as caught:
        load_run(run_file, changes)
    assert message in str(caught.value)
