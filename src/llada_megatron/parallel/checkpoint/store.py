"""Sharded checkpoints that count only once they are complete, and that are read without running what is in them.

Layout of a run's directory:

    step-00000100/              a checkpoint: *.distcp, .metadata, metadata.json, common.pt, manifest.json
    .step-00000200.partial-…/   one being written, or left by a killed run; swept by the next run's first save
    latest                      name of the newest checkpoint

Every method of CheckpointStore is collective: all ranks of the world group call it, and when it fails it fails on all
of them with the same message.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, LladaError, ResourceError
from llada_megatron.parallel import host_group
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint import rank_reader, rank_writer, safety
from llada_megatron.parallel.checkpoint.manifest import DamagedCheckpointError, Manifest
from llada_megatron.parallel.checkpoint.retention import Retention, remove
from llada_megatron.parallel.collectives import agree, as_error, explain, on_rank_0, try_together

_HEADROOM = 1.02  # what file formats add to the bytes of the tensors


@dataclass
class _PendingSave:
    """A save that has been planned and is being written."""

    step: int
    directory: Path
    metadata: dict[str, Any]
    plan: rank_writer.WritePlan
    process: rank_writer.BackgroundWrite | None


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(
        self,
        directory: str | Path,
        keep_last: int = 3,
        asynchronous: bool = False,
        report: Callable[[str], None] | None = None,
        keep_every: int = 0,
        copies: str | Path | None = None,
    ) -> None:
        """Change nothing on the disk before the first save, so that the directory of a running training can be read.

        Args:
            directory: where the step directories are; shared by all ranks, and made by the first save.
            keep_last: how many verified checkpoints are kept (at least one).
            asynchronous: write in the background; where that is impossible, a message says why.
            report: receives one-line messages, on rank 0 only; by default they go to stderr.
            keep_every: checkpoints whose step is a multiple of this are never removed; 0 = there are none such.
            copies: a second directory of the same run's checkpoints, which `latest` looks into as well.
        """
        self.directory = Path(directory).absolute()
        self.retention = Retention(self.directory, max(1, keep_last), keep_every)
        self.copies = Path(copies).absolute() if copies else None
        self.protected: Collection[str] = ()
        """On rank 0: names of step directories that are being read and must not be removed."""
        self._report = report or (lambda text: print(text, file=sys.stderr, flush=True))
        self._pending: _PendingSave | None = None
        self._verified: Path | None = None
        reason = rank_writer.why_not_asynchronous() if asynchronous else None
        self._asynchronous = asynchronous and reason is None
        if reason:
            self._say(f"checkpoints are written synchronously: {reason}")

    @property
    def busy(self) -> bool:
        """Whether a save waits for `poll` or `finish`."""
        return self._pending is not None

    def directory_of(self, step: int) -> Path:
        """Where the checkpoint of `step` lies once it is complete."""
        return self.directory / manifests.step_name(step)

    def _say(self, text: str) -> None:
        if dist.get_rank() == 0:
            self._report(text)

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        sharded_state: dict[str, Any],
        metadata: Mapping[str, Any],
        content_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Write the checkpoint of `step`; an asynchronous one counts after a later `poll` or `finish`.

        Args:
            step: number of steps taken.
            sharded_state: nested dictionaries of Megatron's ShardedTensor and ShardedObject and of plain values; not
                usable afterwards.
            metadata: what the manifest says of the run (JSON values): model, run, step, consumed_samples, layout, …
            content_metadata: how the state was sharded; found again under that key of the loaded state.

        Raises:
            ResourceError: the disk is full, or its free space would not suffice; in this case nothing is written.
            ConfigError: the directory is not the same one on all machines.
            CheckpointError: any other failure. Earlier checkpoints stay as they are.
        """
        self.finish()
        directory = on_rank_0(lambda: self.retention.make_partial(step))
        try:
            seen = directory.is_dir()
            agree(None if seen else f"{directory.parent} is not the same directory on all machines", ConfigError)
            if content_metadata is not None:
                sharded_state["content_metadata"] = content_metadata
            with safety.local_files():
                planned = try_together("planning the checkpoint", lambda: rank_writer.plan(sharded_state, directory))
            self._require_space(planned.size)
        except LladaError:
            self._discard(directory)
            raise
        process = rank_writer.BackgroundWrite(planned) if self._asynchronous else None
        self._pending = _PendingSave(step, directory, dict(metadata), planned, process)
        if process is None:
            self.finish()

    def poll(self) -> Path | None:
        """Complete the pending save if every rank has written its part; returns the checkpoint's directory, or None."""
        if self._pending is None or self._pending.process is None:
            return None
        done = torch.tensor(int(self._pending.process.done()))
        host_group.world().all_reduce(done, dist.ReduceOp.MIN)
        return self.finish() if done else None

    def finish(self) -> Path | None:
        """Wait for the pending save and complete it; returns the checkpoint's directory, or None if there was none.

        Raises:
            ResourceError, CheckpointError: as `save`.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        self._verified = None  # the new directory may take the name of the verified one
        with safety.local_files():
            mine = pending.process.wait() if pending.process else rank_writer.write(pending.plan)
        parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, parts)
        try:
            return on_rank_0(lambda: self._complete(pending, parts or []))
        except LladaError:
            self._discard(pending.directory)
            raise

    def _require_space(self, size: int) -> None:
        """Refuse a save that cannot fit, before its first byte."""
        total = torch.tensor(size, dtype=torch.int64)
        host_group.world().all_reduce(total)

        def check() -> None:
            free, needed = shutil.disk_usage(self.directory).free, int(int(total) * _HEADROOM)
            if free < needed:
                raise ResourceError(
                    f"the checkpoint needs {needed / 1e9:.3f} GB and {self.directory} has {free / 1e9:.3f} GB free: "
                    "make room, lower checkpoint.keep_last, or write elsewhere; earlier checkpoints are untouched"
                )

        on_rank_0(check)

    def _complete(self, pending: _PendingSave, parts: list[rank_writer.WriteResult]) -> Path:
        """On rank 0: make a checkpoint of what the ranks wrote, or raise an error that says why that is impossible."""
        reason = next((f"rank {rank}: {part.error}" for rank, part in enumerate(parts) if part.error), None)
        try:
            if reason is None:
                return self._publish(pending, parts)
        except Exception as error:  # reported in the words of a failed save
            reason = explain(error)
        raise as_error(
            f"the checkpoint of step {pending.step} could not be written ({reason}); earlier checkpoints are untouched"
        )

    def _publish(self, pending: _PendingSave, parts: list[rank_writer.WriteResult]) -> Path:
        """Complete the partial directory, verify it, and give it its name."""
        directory = pending.directory
        pending.plan.writer.finish(pending.plan.metadata, [part.results for part in parts])
        manifests.write_durably(directory / safety.COMMON, pending.plan.common)
        manifests.write_durably(directory / safety.CONFIG, safety.CONFIG_CONTENT)
        files = {name: stated for part in parts for name, stated in part.files.items()}
        files |= {name: manifests.record(directory / name) for name in (safety.METADATA, safety.COMMON, safety.CONFIG)}
        manifests.write(directory, Manifest(pending.metadata, files))
        manifests.verify_sizes(directory, manifests.read(directory))
        manifests.sync_directory(directory)
        return self.retention.publish(directory, pending.step, self.protected)

    def _discard(self, directory: Path) -> None:
        if dist.get_rank() == 0:
            remove(directory)

    # --- loading ----------------------------------------------------------------------------------------------------

    def latest(
        self, thorough: bool = True, check: Callable[[Path, Mapping[str, Any]], None] | None = None
    ) -> Path | None:
        """The newest checkpoint whose files are all whole, or None if there is none at all.

        Those in the directory of copies count as well; of two of the same step, the run's own is preferred.

        Args:
            thorough: compare every file with its SHA-256, each rank reading a share; otherwise compare sizes only.
            check: is called with the path and the metadata, alike on all ranks; a DamagedCheckpointError that it raises
                counts as damage.

        Raises:
            CheckpointError: there are checkpoints, and none is usable.
        """
        faults: list[str] = []
        for _, path in on_rank_0(self._candidates):
            try:
                manifest = self._manifest(path)
                if check is not None:
                    check(path, manifest.metadata)
                if thorough:
                    self._verify(path, manifest)
            except DamagedCheckpointError as error:
                self._say(f"skipped a damaged checkpoint: {error}")
                faults.append(str(error))
                continue
            return path
        if faults:
            raise CheckpointError(
                f"no usable checkpoint in {self.directory} ({'; '.join(faults)}); restore one of them, or move the "
                "directory away to start anew"
            )
        return None

    def _candidates(self) -> list[tuple[int, Path]]:
        own, copied = manifests.steps(self.directory), []
        try:
            copied = manifests.steps(self.copies) if self.copies else []
        except OSError as error:  # unavailable storage must not keep a run from its own checkpoints
            self._say(f"copies of checkpoints cannot be looked for: {explain(error)}")
        return sorted([*own, *copied], key=lambda found: -found[0])

    def metadata(self, path: str | Path) -> dict[str, Any]:
        """The metadata in the manifest of a step directory; its files are checked to have the stated sizes.

        Raises:
            DamagedCheckpointError, CheckpointError: as `load`.
        """
        return self._manifest(Path(path).absolute()).metadata

    def load(
        self, path: str | Path, sharded_state: dict[str, Any], model: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a checkpoint into the layout that `sharded_state` describes.

        Args:
            path: a step directory of any run.
            sharded_state: template as for `save`, under any parallel layout; may name only a part of what was saved.
            model: the run's model (JSON values); a checkpoint of another model is refused.

        Returns:
            (state, metadata): `sharded_state` with values in place of its shards, and the manifest's metadata.

        Raises:
            DamagedCheckpointError: incomplete, or bytes changed.
            CheckpointError: another model, unsafe content, or tensors that do not fit.
        """
        path = Path(path).absolute()
        manifest = self._manifest(path)
        if model is not None:
            manifests.require_model(path, manifest.metadata, model)
        if path != self._verified:
            self._verify(path, manifest)
        rank, world = dist.get_rank(), dist.get_world_size()
        try_together(f"checking {path}", lambda: safety.refuse_unsafe(path, manifest.files, rank, world))

        def read() -> dict[str, Any]:
            with safety.guarded(path, manifest.files):
                return rank_reader.read(sharded_state, path)

        return try_together(f"loading {path}", read), manifest.metadata

    def _manifest(self, path: Path) -> Manifest:
        def read() -> Manifest:
            manifest = manifests.read(path)
            manifests.verify_sizes(path, manifest)
            return manifest

        return on_rank_0(read)

    def _verify(self, path: Path, manifest: Manifest) -> None:
        """Compare every file with its SHA-256; the files are divided among the ranks, the largest first."""
        rank, world = dist.get_rank(), dist.get_world_size()
        by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
        faults = [manifests.verify_digest(path, name, manifest.files[name]) for name in by_size[rank::world]]
        agree(next(filter(None, faults), None), DamagedCheckpointError)
        self._verified = path
