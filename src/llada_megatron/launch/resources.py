"""Checks before any process starts: devices, memory, disk space, prepared data, and weights to start from."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from llada_megatron.console import message, size_text
from llada_megatron.launch.ranks.rank import available_cores
from llada_megatron.llada_moe.config import dump_yaml, load_run
from llada_megatron.llada_moe.errors import ConfigError, DataError, ResourceError
from llada_megatron.llada_moe.model.parameters import count_parameters, rank_shares, trained_parameters
from llada_megatron.llada_moe.overwriting import refuse_inside_checkpoint
from llada_megatron.parallel.checkpoint import manifest as checkpoint_manifest
from llada_megatron.parallel.checkpoint.manifest import DamagedCheckpointError
from llada_megatron.parallel.checkpoint.search import weights_to_start_from
from llada_megatron.parallel.fp8.recipes import require_device
from llada_megatron.parallel.training.callbacks import find_callback
from llada_megatron.parallel.training.recovery.policy import may_go_back

if TYPE_CHECKING:
    from collections.abc import Callable

    from llada_megatron.llada_moe.config.model import ModelConfig
    from llada_megatron.llada_moe.config.run import RunConfig

RANKS_PER_CORE = 4
"""With more processes than this on one core, they mostly wait for each other."""

_PROCESS_BYTES = 250 * 2**20
"""Memory of Python with torch and Megatron-Core, before the first tensor."""
TRAINED_VOCABULARY = 3, 2
"""Ids of the mask and of the end of text in a vocabulary that `llada prepare` trains."""
CONFIG_NAME = "config.yaml"
"""The file of a run's folder that its resolved configuration is written to."""
_DATA_SUFFIXES = (".bin", ".idx", ".json")


def check_data(run: RunConfig) -> None:
    """Refuse a run of which a prepared set is missing.

    Raises:
        DataError: with the missing files and the command that makes them.
    """
    for prepared in run.data.sets:
        missing = [prepared.path + suffix for suffix in _DATA_SUFFIXES if not Path(prepared.path + suffix).is_file()]
        if missing:
            raise DataError(
                f"no prepared data at {prepared.path} ({', '.join(missing)} missing); "
                f"make it with: llada prepare TEXT --output {prepared.path} {_tokenizer_options(run.model)}"
            )


def _tokenizer_options(model: ModelConfig) -> str:
    """Options of `llada prepare` by which the tokens become those of the model."""
    if (model.mask_token_id, model.eos_token_id) == TRAINED_VOCABULARY:
        return f"--train-tokenizer --vocab-size {model.vocab_size}"
    ids = f"whose mask token is {model.mask_token_id} and whose end of text is {model.eos_token_id}"
    return f"--tokenizer FILE (the model's own, {ids})"


def check_inputs(config: str, run: RunConfig) -> None:
    """Refuse a run that would write over the file it was read from, or into a checkpoint.

    The resolved configuration goes to OUTPUT_DIR/config.yaml. A file there that an earlier start of the run wrote may
    be given as CONFIG, with other values; one that somebody wrote by hand stays as it is.

    Raises:
        ConfigError: with what to do.
    """
    refuse_inside_checkpoint("output_dir", Path(run.output_dir) / CONFIG_NAME)
    written = Path(run.output_dir) / CONFIG_NAME
    if not (written.is_file() and Path(config).is_file() and written.samefile(config)):
        return
    try:
        before = load_run(written)
        same = before == run or written.read_text("utf-8") == dump_yaml(before)
    except ConfigError:  # it is complete only with what the command line adds
        same = False
    if not same:
        raise ConfigError(
            f"{config}: the run would write its resolved configuration over this file, which is its own input; give it "
            f"another name than {CONFIG_NAME}, or set another output_dir"
        )


def check_callbacks(run: RunConfig) -> None:
    """Refuse a run whose `logging.callbacks` are not there. Raises ConfigError."""
    for name in run.logging.callbacks:
        find_callback(name)


def check_weights(run: RunConfig) -> None:
    """Refuse a run that would start from weights that are missing or of another model, or would continue another run.

    Raises:
        CheckpointError: something is wrong with `checkpoint.load`, in a run without checkpoints of its own.
        ConfigError: the run has no checkpoints of its own, and those in `checkpoint.copy_to` are of another run.
    """
    own, *copies = (checkpoint_manifest.steps(folder) for folder in _checkpoint_folders(run))
    if own:
        return
    if any(copies):
        _check_copies(run, copies[0])
    else:
        weights_to_start_from(run)


def _check_copies(run: RunConfig, copies: list[tuple[int, Path]]) -> None:
    for _, path in copies:
        try:
            owner = checkpoint_manifest.read(path).metadata["run"]["output_dir"]
        except (DamagedCheckpointError, KeyError):
            continue
        if Path(str(owner)).absolute() != Path(run.output_dir).absolute():
            raise ConfigError(
                f"{run.output_dir} has no checkpoints, and those in checkpoint.copy_to ({path.parent}) are of the run "
                f"in {owner}; set another copy_to for a new run, or output_dir={owner} to go on with that one"
            )
        return


def check_space(run: RunConfig) -> None:
    """Refuse a run whose checkpoints will not fit on the disk, beside what is there; quotas are not checked.

    Raises:
        ResourceError: with the arithmetic and what to change.
    """
    size, together = checkpoint_bytes(run), checkpoints_at_once(run)
    claimed: Counter[int] = Counter()  # by file system: the copies may be on the same one
    for folder in _checkpoint_folders(run):
        there = checkpoint_manifest.steps(folder)
        if there and there[0][0] >= run.training.steps:
            continue  # this run is finished: nothing will be written
        disk = _nearest(folder)
        needed, free = max(0, together - len(there)) * size, shutil.disk_usage(disk).free
        free -= claimed[disk.stat().st_dev]
        claimed[disk.stat().st_dev] += needed
        if needed > free:
            kept = f", and those of checkpoint.keep_every {run.checkpoint.keep_every}" * bool(run.checkpoint.keep_every)
            raise ResourceError(
                f"the checkpoints in {folder} need {size_text(needed)}, but {size_text(max(0, free))} are free: "
                f"{together} will be there at once (checkpoint.keep_last {run.checkpoint.keep_last}, the one being "
                f"written{kept}), of {size_text(size)} each, and {len(there)} of them exist; make room, keep fewer, or "
                "write elsewhere"
            )


def checkpoint_bytes(run: RunConfig) -> int:
    """Size of one checkpoint in bytes: weights in the training's precision, and of those that are trained fp32 main
    weights and Adam's two moments.

    The real size is larger by names, shard descriptions and hashes: 2 % at 3 M parameters, less above.
    """
    weight = 2 if run.training.precision == "bf16" else 4
    trained = trained_parameters(run.model, run.training)
    factors = trained if run.training.lora is not None else 0
    return (count_parameters(run.model).trainable + factors) * weight + trained * (4 + 4 + 4)


def checkpoints_at_once(run: RunConfig) -> int:
    """The largest number of checkpoints in one folder: while one is written, those before it are still there."""
    settings = run.checkpoint
    saved = [*range(settings.interval, run.training.steps, settings.interval), run.training.steps]
    if may_go_back(run.recovery):
        saved.insert(0, 0)
    for_ever = {step for step in saved if step and settings.keep_every and step % settings.keep_every == 0}
    return len(for_ever.union(saved[-settings.keep_last - 1 :]))


def _checkpoint_folders(run: RunConfig) -> list[Path]:
    """The folders with checkpoints of the run: its own, and that of the copies."""
    own = Path(run.output_dir) / "checkpoints"
    return [own, Path(run.checkpoint.copy_to)] if run.checkpoint.copy_to else [own]


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def check_machine(run: RunConfig, oversubscribe: bool = False) -> None:
    """Refuse a layout with more ranks than this machine has GPUs, or cores and memory where it has no GPU; also GPUs
    that torch cannot use because of their driver, and FP8 where it cannot be.

    Raises:
        ResourceError: with the arithmetic and what to change.
    """
    import torch

    from llada_megatron.parallel.machine import driver_fault

    ranks = run.layout.world_size
    if torch.cuda.is_available():
        check_gpus(ranks, torch.cuda.device_count())
        _check_this_gpu(run)
        require_device(run.training.fp8)
        return
    fault = driver_fault()
    if fault:
        raise ResourceError(fault)
    require_device(run.training.fp8)
    check_cores(ranks, available_cores(), oversubscribe)
    check_memory(needed_bytes(run), psutil.virtual_memory().available, ranks)


def check_gpu_of_rank(run: RunConfig, rank: int) -> None:
    """What `check_machine` does for the ranks that it is asked to start, in one that is started already: refuse a run
    that is too large for the GPUs of its machine, where it has some; rank 0 warns.

    Raises:
        ResourceError: with the estimate and the change by which it would fit.
    """
    import torch

    if torch.cuda.is_available():
        _check_this_gpu(run, message if rank == 0 else lambda text: None)


def _check_this_gpu(run: RunConfig, say: Callable[[str], None] = message) -> None:
    """Refuse, or warn of, a run that is too large for the GPUs here."""
    import torch

    from llada_megatron.launch.gpu_memory import check_gpu_memory, sheet_of_memory

    found = torch.cuda.get_device_properties(0)
    warning = check_gpu_memory(run, sheet_of_memory(found.name, found.total_memory))
    if warning:
        say(f"warning: {warning}")


def check_gpus(ranks: int, devices: int) -> None:
    """Refuse more ranks than GPUs. Raises ResourceError."""
    if ranks > devices:
        raise ResourceError(
            f"the layout has {ranks} ranks, one per GPU, but {devices} {_plural('GPU', devices)} can be seen here; "
            "lower the layout's axes, check CUDA_VISIBLE_DEVICES, or start it on more machines with torchrun or srun"
        )


def check_cores(ranks: int, cores: int, oversubscribe: bool) -> None:
    """Refuse more than `RANKS_PER_CORE` ranks on a core, unless `oversubscribe`. Raises ResourceError."""
    if ranks > RANKS_PER_CORE * cores and not oversubscribe:
        raise ResourceError(
            f"the layout has {ranks} ranks, but {cores} {_plural('core', cores)} carry at most "
            f"{RANKS_PER_CORE * cores} ({RANKS_PER_CORE} each) before they mostly wait for each other; "
            "lower the layout's axes, or add --oversubscribe"
        )


def check_memory(needed: int, available: int, ranks: int) -> None:
    """Refuse a model whose weights and training state alone do not fit (sizes in bytes). Raises ResourceError."""
    if needed > available:
        need = "rank needs" if ranks == 1 else "ranks need"
        raise ResourceError(
            f"{ranks} {need} at least {needed / 2**30:.1f} GB of memory for weights, gradients and optimizer state, "
            f"but {available / 2**30:.1f} GB are free; take a smaller model, or more machines"
        )


def needed_bytes(run: RunConfig) -> int:
    """A lower bound of the memory of all ranks together, in bytes: activations, logits and buffers are not counted.

    Per parameter: weight and, where it is trained, gradient on every rank that holds it; the fp32 main weight (for
    bf16) and the two moments of Adam are divided among the data-parallel ranks, hence counted once per model.
    """
    trained = trained_parameters(run.model, run.training) / count_parameters(run.model).trainable
    weight_and_gradient = 2 + 4 * trained if run.training.precision == "bf16" else 4 + 4 * trained
    optimizer = trained * (4 + 4 + (4 if run.training.precision == "bf16" else 0))
    copies = run.layout.data_parallel * run.layout.context_parallel
    total = 0.0
    for share in rank_shares(run.model, run.layout):
        held = share.parameters * len(share.ranks)
        total += held * weight_and_gradient + held // copies * optimizer + len(share.ranks) * _PROCESS_BYTES
    return int(total)


def _plural(word: str, number: int) -> str:
    return word if number == 1 else word + "s"
