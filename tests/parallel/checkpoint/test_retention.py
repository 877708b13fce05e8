"""Which checkpoints are kept: damaged ones do not count, and those from before them stay."""

from pathlib import Path

from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint.retention import Retention


def save(retention: Retention, step: int) -> Path:
    partial = retention.make_partial(step)
    (partial / "weights").write_bytes(b"12345")
    manifests.write(partial, manifests.Manifest({}, {"weights": manifests.record(partial / "weights")}))
    return retention.publish(partial, step)


def kept(retention: Retention) -> list[int]:
    return [step for step, _ in manifests.steps(retention.path)][::-1]


def test_a_damaged_checkpoint_does_not_count_among_the_last(tmp_path):
    retention = Retention(tmp_path, keep_last=2)
    paths = {step: save(retention, step) for step in (1, 2, 3)}
    assert kept(retention) == [2, 3]
    (paths[3] / "weights").write_bytes(b"123")
    save(retention, 4)
    assert kept(retention) == [2, 3, 4]  # two whole ones
    save(retention, 5)
    assert kept(retention) == [4, 5]
