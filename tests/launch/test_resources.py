"""What is refused before a process starts: too many ranks, too little memory, data that is not there."""

import dataclasses

import pytest

from llada_megatron.launch import resources
from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.config.schema import LayoutConfig
from llada_megatron.llada_moe.errors import DataError, ResourceError


@pytest.fixture
def demo():
    return load_run("configs/runs/demo.yaml")


def test_more_ranks_than_gpus():
    resources.check_gpus(8, 8)
    with pytest.raises(ResourceError, match="16 ranks, one per GPU, but 8 GPUs can be seen"):
        resources.check_gpus(16, 8)


def test_more_ranks_than_cores_carry():
    resources.check_cores(8, 2, oversubscribe=False)
    resources.check_cores(64, 2, oversubscribe=True)
    with pytest.raises(ResourceError, match="9 ranks, but 2 cores carry at most 8.*--oversubscribe"):
        resources.check_cores(9, 2, oversubscribe=False)


def test_more_memory_than_there_is():
    resources.check_memory(2**30, 2**30, 1)
    with pytest.raises(ResourceError, match=r"2 ranks need at least 3\.0 GB.*but 1\.0 GB are free"):
        resources.check_memory(3 * 2**30, 2**30, 2)


def test_memory_of_the_state_is_a_lower_bound_by_parameters(demo):
    from llada_megatron.llada_moe.model.parameters import count_parameters

    one = dataclasses.replace(demo, layout=LayoutConfig())
    trainable = count_parameters(demo.model).trainable
    base = resources.needed_bytes(one) - 16 * trainable
    assert 0 < base < 2**30
    bf16 = dataclasses.replace(one, training=dataclasses.replace(one.training, precision="bf16"))
    assert resources.needed_bytes(bf16) == base + 18 * trainable


def test_a_model_of_another_size_class_is_refused_here(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = load_run("configs/runs/llada-8b-pretrain.yaml")
    with pytest.raises(ResourceError, match="memory for weights, gradients and optimizer state|cores carry at most"):
        resources.check_machine(dataclasses.replace(run, layout=LayoutConfig()))


def test_data_that_is_not_there_is_named_with_the_remedy(demo, tmp_path):
    prefix = tmp_path / "corpus"
    (tmp_path / "corpus.bin").touch()
    sets = [dataclasses.replace(demo.data.sets[0], path=str(prefix))]
    run = dataclasses.replace(demo, data=dataclasses.replace(demo.data, sets=sets))
    with pytest.raises(DataError) as error:
        resources.check_data(run)
    assert f"({prefix}.idx, {prefix}.json not there)" in str(error.value)
    assert f"llada prepare TEXT --output {prefix}" in str(error.value)
    (tmp_path / "corpus.idx").touch()
    (tmp_path / "corpus.json").touch()
    resources.check_data(run)
