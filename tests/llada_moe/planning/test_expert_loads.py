"""Measured loads of experts: read from a profile, refused where it is of another model, and felt in the plan."""

import json
from dataclasses import replace

import pytest

from llada_megatron.llada_moe.config import load_model, load_run
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.planning.estimate import Assumptions, Estimate
from llada_megatron.llada_moe.planning.expert_loads import fullest_over_mean, read_loads
from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu
from llada_megatron.llada_moe.planning.memory import fullest, memory_by_stage
from llada_megatron.llada_moe.planning.workload import of_run

RUN = load_run("llada2-flash-pretrain")
MODEL = RUN.model


def profile(path, uneven_layer=None, **changes):
    """What `llada experts --output` writes of the loads: layers are counted from 1, dense ones are left out."""
    model, moe = MODEL, MODEL.moe
    layers = {
        str(n): {"tokens": [100] * moe.num_experts} for n in range(moe.leading_dense_layers + 1, 1 + model.num_layers)
    }
    if uneven_layer is not None:
        layers[str(uneven_layer)]["tokens"] = [300] * 32 + [100] * (moe.num_experts - 32)
    path.write_text(
        json.dumps(
            {
                "schema": 1,
                "model": {"family": model.family, "moe.top_k": moe.top_k},
                "experts": moe.num_experts,
                "top_k": moe.top_k,
                "layers": layers,
            }
            | changes
        )
    )
    return str(path)


def test_the_fullest_rank_holds_experts_that_are_neighbours():
    assert fullest_over_mean((4, 0, 1, 1, 1, 1), 3) == 4 * 3 / 8
    assert fullest_over_mean((4, 0, 1, 1, 1, 1), 2) == 5 * 2 / 8
    assert fullest_over_mean((4, 0, 1, 1, 1, 1), 1) == 1.0


def test_layers_are_those_of_the_model(tmp_path):
    loads = read_loads(profile(tmp_path / "profile.json", uneven_layer=5), MODEL)
    found = loads.imbalances(8)
    assert len(found) == MODEL.num_layers and found[0] == 1.0 and loads.tokens[0] == ()  # the first layer is dense
    assert [layer for layer, imbalance in enumerate(found) if imbalance != 1.0] == [4]
    assert found[4] == pytest.approx(300 * 32 * 8 / (300 * 32 + 100 * 224))


def test_the_plan_feels_the_layer_that_is_uneven(tmp_path):
    loads = read_loads(profile(tmp_path / "profile.json", uneven_layer=5), MODEL)
    even = read_loads(profile(tmp_path / "even.json"), MODEL)
    plans = [Estimate(RUN, load_gpu("h100"), Assumptions(loads=each)) for each in (even, loads)]
    assert plans[0].time.total == Estimate(RUN, load_gpu("h100"), Assumptions(imbalance=1.0)).time.total
    for stage, layers in enumerate(plans[0].workload.stage_layers):
        even_stage, uneven_stage = (plan.stages[stage].allocated for plan in plans)
        even_time, uneven_time = (plan.time.stages[stage] for plan in plans)
        assert (uneven_stage > even_stage) == (4 in layers) and (uneven_time > even_time) == (4 in layers)


def test_one_expert_rank_has_all_rows_however_uneven():
    alone = replace(RUN.layout, expert_parallel=1)
    peaks = [fullest(memory_by_stage(of_run(replace(RUN, layout=alone), each))).allocated for each in (1.0, 3.0)]
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "No such file or directory; `llada experts --output DIR` writes it"),
        ("{", "not JSON"),
        ("[]", "its `schema` is not 1"),
        ('{"schema": 2, "layers": {}}', "its `schema` is not 1"),
        ('{"schema": 1, "layers": {}}', "it has no `layers` or no `model`"),
        (
            '{"schema": 1, "model": {}, "layers": {"2": {"tokens": [1, -1]}}, "experts": 2, "top_k": 1}',
            "layer '2' has no `tokens`",
        ),
        (
            '{"schema": 1, "model": {}, "layers": {"2": {"tokens": [1]}}, "experts": 2, "top_k": 1}',
            "must have the tokens of 2 experts",
        ),
        ('{"schema": 1, "model": {}, "layers": {"2": {"tokens": [0, 0]}}, "experts": 2, "top_k": 1}', "not all 0"),
        ('{"schema": 1, "model": {}, "layers": {"2": {"tokens": [1, 1]}}, "top_k": 1}', "`experts` is not a number"),
    ],
)
def test_what_is_no_profile_is_one_line(tmp_path, content, fault):
    file = tmp_path / "profile.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=r"--profile .*profile.json: ") as error:
        read_loads(str(file), MODEL)
    assert fault in str(error.value) and "\n" not in str(error.value)


def test_a_profile_of_another_model_is_refused(tmp_path):
    file = profile(tmp_path / "profile.json")
    found = "family llada2, not llada_moe; layers with experts 2 to 32, not 1 to 16; 256 experts, 8 for each token"
    with pytest.raises(ConfigError, match=f"another model than the run's: {found}, not 64, 8$"):
        read_loads(file, load_model("llada-moe-7b-a1b"))
    with pytest.raises(ConfigError, match="the run's model is dense"):
        read_loads(file, load_model("llada-8b"))
    with pytest.raises(ConfigError, match="256 experts, 4 for each token, not 256, 8$"):
        read_loads(profile(tmp_path / "other.json", top_k=4), MODEL)
    with pytest.raises(ConfigError, match=r"another model than the run's: layers with experts 2 to 32, not 2 to 31$"):
        read_loads(file, replace(MODEL, num_layers=MODEL.num_layers - 1))
    with pytest.raises(ConfigError, match=r"moe.expert_ffn_hidden_size 1, not \d+$"):
        read_loads(profile(tmp_path / "sizes.json", model={"moe.expert_ffn_hidden_size": 1}), MODEL)
