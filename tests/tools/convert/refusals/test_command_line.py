"""What the command line says of a conversion, and its exit codes."""

import json

from llada_megatron import cli
from tests.tools.convert.checkpoints import tensors_of


def test_exit_codes(source, tmp_path, capsys):
    for words, code in (
        (["import", str(source), str(tmp_path / "out"), "--layout", "tensor_parallel=3"], 2),
        (["import", str(source), str(tmp_path / "out"), "--workers", "0"], 2),
        (["export", str(source), str(tmp_path / "out"), "--shard-size", "many"], 2),
        (["verify", str(source), str(source), "--tolerance", "-1"], 2),
        (["import", str(tmp_path / "absent"), str(tmp_path / "out")], 1),
        (["export", str(source), str(tmp_path / "out")], 1),
    ):
        assert cli.main(["convert", *words, "--json"]) == code, words
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1
        assert json.loads(captured.out)["exit_code"] == code
    assert not (tmp_path / "out").exists()


def test_what_a_conversion_says(source, tmp_path, capsys):
    assert cli.main(["convert", "import", str(source), str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "note: no tokenizer files in it" in captured.err
    line, report = captured.out.splitlines()
    assert (
        line
        == f"{tmp_path}/out/checkpoints/step-00000000: llada_moe, {len(tensors_of('tiny-moe-softmax'))} tensors, "
        + (f"{sum(value.numel() for value in tensors_of('tiny-moe-softmax').values()):,} parameters, 563 KB")
    )
    assert json.loads(report)["bytes"] == sum(value.nbytes for value in tensors_of("tiny-moe-softmax").values())
