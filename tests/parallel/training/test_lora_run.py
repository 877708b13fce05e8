"""A LoRA run from an imported model to what is made of it: resumed, sampled, merged, exported, loaded by peft."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llada_megatron.cli import main
from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig, ValidationConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.trained_parts import LoRAConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.model.patterns import whole_sequences
from llada_megatron.llada_moe.objectives.fine_tuning import FineTuningConfig
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint.conversion.shard_reader import ShardedReader
from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
from llada_megatron.parallel.sampling.chat_template import LLADA
from llada_megatron.tools.convert import adapter_exporter
from tests.launch.sampling.checkpoints import VOCABULARY, checkpoint, run_cli
from tests.llada_moe.huggingface.exported import load, modules_in
from tests.ranks import RankFailure, run_ranks
from tests.tools.convert.checkpoints import read

LAYOUT = LayoutConfig(tensor_parallel=2, sequence_parallel=True, expert_parallel=2)
STEPS = 4


def train(run, until=STEPS):
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.training.trainer import Trainer

    topology.initialize(run.layout, run.training.seed)
    trainer = Trainer(run)
    trainer.train(lambda: trainer.state.step >= until)  # after the step that is under way
    return trainer.state.step


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    base = checkpoint(root, "tiny-moe", LLADA)
    turns = [("user", "q" * size, "assistant", "a" * size) for size in range(1, 20)]
    records = [{"messages": [{"role": r, "content": c} for r, c in ((a, b), (c, d))]} for a, b, c, d in turns]
    (root / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["prepare", str(root / "chats.jsonl"), "--chat", "--output", str(root / "set")]
    assert main([*command, "--tokenizer", str(root / "tiny-moe-source/tokenizer.json")]) == 0
    return RunConfig(
        model=dataclasses.replace(load_model("tiny-moe"), vocab_size=VOCABULARY),
        training=TrainingConfig(
            steps=STEPS, sequence_length=64, global_batch_size=2, precision="fp32", lora=LoRAConfig(rank=4, alpha=8.0)
        ),
        data=DataConfig(sets=[DataSetConfig(path=str(root / "set"))], validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-2)),
        objective=FineTuningConfig(kind="sft"),
        layout=LAYOUT,
        checkpoint=CheckpointConfig(interval=2, load=str(base)),
        validation=ValidationConfig(interval=STEPS, sequences=2),
        logging=LoggingConfig(interval=1, tensorboard=False),
        output_dir=str(root / "run"),
    )


@pytest.fixture(scope="module")
def trained(run):
    """The last step of the run."""
    assert run_ranks(train, 2, run) == [STEPS] * 2
    return Path(run.output_dir) / "checkpoints" / manifests.step_name(STEPS)


@torch.no_grad()
def logits_of(model, tokens):
    """Logits `[seq, vocab]` of one sequence, with attention in both directions."""
    return model(tokens, attention_mask=torch.ones(1, 1, tokens.size(1), tokens.size(1), dtype=torch.bool)).logits[0]


def our_logits(trained, tokens):
    with open_checkpoint(trained) as loaded:
        return loaded.logits(tokens, torch.ones_like(tokens, dtype=torch.bool), whole_sequences(1, tokens.size(1)))


def test_only_the_factors_are_trained_and_have_optimizer_state(run, trained):
    base, tuned = ShardedReader(next(Path(run.checkpoint.load).glob("checkpoints/step-*"))), ShardedReader(trained)
    factors = tuned.tensors.keys() - base.tensors.keys()
    assert len(factors) == 2 * (2 * 4 + 2 + 3 * 4) and all(key.endswith(("lora_A", "lora_B")) for key in factors)
    assert all(torch.equal(tuned.read(key), base.read(key)) for key in base.tensors)  # router biases, too
    assert all(tuned.read(key).abs().max() > 0 for key in factors)
    from torch.distributed.checkpoint import FileSystemReader

    saved = FileSystemReader(trained).read_metadata().state_dict_metadata
    prefix = "optimizer.state.exp_avg."
    states = {key.removeprefix(prefix) for key in saved if key.startswith(prefix)}
    assert states == factors


def test_a_run_that_was_stopped_ends_in_the_same_bits(run, trained, tmp_path):
    again = dataclasses.replace(run, output_dir=str(tmp_path / "again"))
    assert run_ranks(train, 2, again, 1)[0] == 2
    assert run_ranks(train, 2, again)[0] == STEPS
    files = [manifests.read(folder).files for folder in (trained, tmp_path / "again/checkpoints" / trained.name)]
    digests = [{name: file.sha256 for name, file in found.items() if name.endswith(".distcp")} for found in files]
    assert digests[0] == digests[1] and len(digests[0]) >= 2


def test_a_run_goes_on_with_its_own_factors_only(run, trained):
    other = dataclasses.replace(run.training, lora=LoRAConfig(rank=8, alpha=8.0))
    with pytest.raises(RankFailure, match=r"training.lora.rank was 4 and is 8"):
        run_ranks(train, 1, dataclasses.replace(run, training=other, layout=LayoutConfig()))
    start = dataclasses.replace(run.checkpoint, load=str(trained))
    fresh = dataclasses.replace(
        run, training=other, layout=LayoutConfig(), checkpoint=start, output_dir=f"{run.output_dir}-fresh"
    )
    with pytest.raises(RankFailure, match="merge them first"):
        run_ranks(train, 1, fresh)


def test_it_is_exported_merged_and_as_an_adapter(run, trained, tmp_path, capsys):
    assert run_cli(capsys, "convert", "export", trained, tmp_path / "merged")[0] == 0
    code, out, err = run_cli(capsys, "convert", "export", trained, tmp_path / "adapter", "--adapter")
    assert code == 0, err
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    source = Path(run.checkpoint.load).with_name(config["base_model_name_or_path"])
    base, merged, adapter = (read(folder) for folder in (source, tmp_path / "merged", tmp_path / "adapter"))
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter}
    assert {name.rpartition(".")[2] for name in modules} == set(config["target_modules"])
    changed = 0
    for name, tensor in base.items():
        module = name.removesuffix(".weight")
        if module not in modules:
            assert torch.equal(merged[name], tensor), name
            continue
        a, b = (adapter[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        assert a.shape == (4, tensor.size(1)) and b.shape == (tensor.size(0), 4)
        torch.testing.assert_close(merged[name], tensor + 2.0 * b @ a, atol=1e-6, rtol=0)
        changed += not torch.equal(merged[name], tensor)
    assert changed > len(modules) / 2  # not an expert that no token came to
    tokens = torch.arange(8, 40)[None]
    with modules_in(tmp_path / "modules"):
        theirs = logits_of(load(tmp_path / "merged"), tokens)
    torch.testing.assert_close(theirs, our_logits(trained, tokens), atol=1e-5, rtol=0)
    code, out, _ = run_cli(capsys, "convert", "inspect", trained)
    assert code == 0 and "rank 4, alpha 8, on linear_qkv" in out and "all there, none too many" in out
    code, _, err = run_cli(capsys, "convert", "export", run.checkpoint.load, tmp_path / "none", "--adapter")
    assert code == 2 and "holds no adapter; leave out --adapter" in err


@pytest.mark.parametrize(
    ("load", "base"),
    [("import", "org/name"), ("same factors", "org/name"), ("our own run", None), ("gone", None), (None, None)],
)
def test_the_base_of_an_adapter_is_what_peft_can_load(monkeypatch, load, base):
    def source(load, lora=None, **metadata):
        return SimpleNamespace(
            run=SimpleNamespace(checkpoint=CheckpointConfig(load=load)), lora=lora, metadata=metadata
        )

    found = {
        "import": source(None, imported={"from": "org/name"}),
        "same factors": source("import", LoRAConfig()),
        "our own run": source("import"),
    }

    def opened(path):
        if str(path) not in found:
            raise CheckpointError(f"no checkpoint in {path}")
        return found[str(path)]

    monkeypatch.setattr(adapter_exporter, "ShardedSource", opened)
    assert adapter_exporter.origin(source(load, LoRAConfig())) == base


def test_peft_loads_the_adapter(run, trained, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    assert run_cli(capsys, "convert", "export", trained, tmp_path / "adapter", "--adapter")[0] == 0
    tokens = torch.arange(8, 40)[None]
    with modules_in(tmp_path / "modules"):
        run_cli(capsys, "convert", "export", run.checkpoint.load, tmp_path / "base")
        base = load(tmp_path / "base")
        before = logits_of(base, tokens)
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        found = {name.replace(".default.", "."): part for name, part in adapted.named_parameters() if "lora_" in name}
        assert found.keys() == read(tmp_path / "adapter").keys()
        theirs = logits_of(adapted, tokens)
    assert (theirs - before).abs().max() > 0.1
    torch.testing.assert_close(theirs, our_logits(trained, tokens), atol=1e-5, rtol=0)
