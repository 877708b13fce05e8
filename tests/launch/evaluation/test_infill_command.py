"""`llada eval infill`: a table of every length and writer, and what is said of wrong input."""

from __future__ import annotations

import json

from tests.launch.sampling.checkpoints import run_cli

TEXTS = ["def f(x):\n    return x + 1\n", "for i in range(3):\n    print(i)\n", "a = [1, 2, 3, 4, 5, 6, 7]\n"]


def test_figures_of_every_length_and_writer(dense, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    words = ("--texts", tmp_path / "texts.jsonl", "--lengths", "1,4", "--spans", 2, "--samples", 8, "--python")
    code, out, err = run_cli(
        capsys, "eval", "infill", dense, *words, "--find-length", "--json", "--output", tmp_path / "o.json"
    )
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    rows = {(row["writer"], row["length"]): row for row in found["rows"]}
    assert set(rows) == {
        (writer, length) for writer in ("this model", "this model, length found", "unigram") for length in (1, 4)
    }
    assert all(row["spans"] == 2 and row["bits_per_token"]["value"] > 0 for row in rows.values())
    assert all(row[key]["error"] is not None for row in rows.values() for key in ("exact", "bits_per_token"))
    assert rows["this model", 4]["parses"] is not None
    assert (rows["this model", 4]["length_right"], rows["this model, length found", 4]["length_right"] is None) == (
        None,
        False,
    )
    assert json.loads((tmp_path / "o.json").read_text()) == found
    assert found["protocol"]["source"] == str(tmp_path / "texts.jsonl")
    assert "the true length of a span is given, except" in out
    assert "8 samples in strata of 8" in out


def test_wrong_input(dense, tmp_path, capsys):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "ab"}\n')
    for words, code, told in [
        (("--texts", file, "--lengths", "0"), 2, "--lengths 0: whole numbers from 1"),
        (("--texts", file, "--lengths", "4"), 1, "no text has 12 tokens"),
        (("--texts", file, "--spans", 0), 2, "--spans 0: at least 1"),
        (("--texts", tmp_path / "none"), 1, "No such file"),
        (("--texts", file, "--output", tmp_path), 2, "give a file in a folder that there is"),
        (("--texts", file, "--output", file), 2, "name another place"),
        (("--texts", file, "--autoregressive", tmp_path / "none"), 1, "there is no checkpoint"),
    ]:
        found, _, err = run_cli(capsys, "eval", "infill", dense, *words)
        assert (found, told in err) == (code, True), err
