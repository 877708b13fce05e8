"""Every configuration in the repository loads, and the published ones are what was published."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from llada_megatron.llada_moe.config import RunConfig, load_model, load_run
from llada_megatron.llada_moe.config.optimizer import learning_rate
from llada_megatron.llada_moe.config.parsing import key_paths
from llada_megatron.llada_moe.config.trained_parts import LoRAConfig

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TOKENS_PER_STEP = 1280 * 4096


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("models/*.yaml")), ids=lambda path: path.stem)
def test_models_load(path):
    assert load_model(path) == load_model(path.stem)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("runs/*.yaml")), ids=lambda path: path.stem)
def test_runs_load(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing may depend on the current directory
    load_run(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("recovery/*.yaml")), ids=lambda path: path.stem)
def test_recovery_policies_load_by_name(path):
    named = load_run(CONFIGS / "runs/small-diffusion.yaml", [f"recovery={path.stem}"])
    assert named == load_run(CONFIGS / "runs/small-diffusion.yaml", [f"recovery={path}"])


def test_the_policy_of_llada_8b_goes_from_its_first_rate_to_its_second():
    run = load_run(CONFIGS / "runs/llada-8b-pretrain.yaml", ["recovery=llada"])
    assert run.recovery.not_finite == "rollback"
    rate = run.optimizer.learning_rate
    assert rate.peak * run.recovery.learning_rate_factor == rate.drops[0].value == 1e-4


def test_llada_8b_learning_rate_follows_the_published_token_counts():
    run = load_run(CONFIGS / "runs/llada-8b-pretrain.yaml")
    assert run.training.global_batch_size * run.training.sequence_length == TOKENS_PER_STEP

    def at(tokens: float) -> float:
        return learning_rate(run.optimizer.learning_rate, int(tokens / TOKENS_PER_STEP), run.training.steps)

    assert learning_rate(run.optimizer.learning_rate, 999, run.training.steps) == pytest.approx(2e-4)
    assert at(0.1e12) == at(1.1999e12) == 4e-4
    assert at(1.2001e12) == at(1.9999e12) == 1e-4
    assert at(2.15e12) == pytest.approx(5.5e-5, rel=1e-3)
    assert learning_rate(run.optimizer.learning_rate, run.training.steps - 1, run.training.steps) == pytest.approx(1e-5)
    assert run.training.steps * TOKENS_PER_STEP == pytest.approx(2.3e12, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "twin"), [("small-diffusion", "small-autoregressive"), ("demo", "demo-autoregressive")]
)
def test_an_autoregressive_twin_differs_in_its_objective_and_its_ranks_only(name, twin):
    diffusion, other = load_run(CONFIGS / f"runs/{name}.yaml"), load_run(CONFIGS / f"runs/{twin}.yaml")
    assert other.objective.kind == "autoregressive"
    same = {key: getattr(diffusion, key) for key in ("objective", "output_dir", "layout")}
    assert dataclasses.replace(other, **same) == diffusion


def test_every_key_is_read_by_something():
    """A key that only the configuration knows would promise what nothing does."""
    sources = [path for path in (CONFIGS.parent / "src").rglob("*.py") if path.parent.name != "config"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    unread = {path for path in key_paths(RunConfig) if not re.search(rf"\.{path.rpartition('.')[2]}\b", code)}
    assert unread <= {"model.family"}  # read by validation: it says which published format the model can be exported to


def test_the_documented_keys_are_all_keys_and_their_defaults(tmp_path):
    text = (CONFIGS.parent / "docs/configuration.md").read_text(encoding="utf-8")
    example = text.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "all.yaml").write_text(example, encoding="utf-8")
    required = [line for line in example.splitlines() if "# *" in line or line.lstrip().startswith(("moe:", "fp8:"))]
    (tmp_path / "required.yaml").write_text("\n".join(required), encoding="utf-8")
    assert load_run(tmp_path / "all.yaml", ["training.lora=null"]) == load_run(tmp_path / "required.yaml")
    assert load_run(tmp_path / "all.yaml", ["training.fp8=null"]).training.lora == LoRAConfig()  # never both

    def keys(value: object, prefix: str = "") -> set[str]:
        if isinstance(value, list):
            value = value[0] if value else {}
        inner = value.items() if isinstance(value, dict) else ()
        return {prefix + key for key, _ in inner}.union(*(keys(child, f"{prefix}{key}.") for key, child in inner))

    shown = keys(yaml.safe_load(example)) | {f"optimizer.learning_rate.drops.{key}" for key in ("step", "value")}
    assert shown == set(key_paths(RunConfig))
