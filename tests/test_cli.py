"""The `llada` program: help without torch, one message per error, exit codes, streams."""

from __future__ import annotations

import email.message
import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llada_megatron import __version__, cli, console, report_address
from llada_megatron.llada_moe.errors import ConfigError, DataError

LLADA = [sys.executable, "-m", "llada_megatron.cli"]
HEAVY = {"torch", "megatron", "numpy", "sentencepiece", "tensorboard", "transformers"}


@pytest.fixture
def command(monkeypatch):
    """Install a subcommand `probe` whose `run` is given."""

    def install(run):
        module = SimpleNamespace(run=run, add_arguments=lambda parser: parser.add_argument("words", nargs="*"))
        monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_module", "a command for tests"))
        monkeypatch.setitem(sys.modules, "probe_module", module)

    return install


def raising(error):
    def run(args):
        raise error

    return run


def test_help_imports_nothing_heavy_and_is_quick():
    code = (
        "import sys, time\n"
        "from llada_megatron import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        f"assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)\n"
        "print(time.process_time(), file=sys.stderr)"  # with the interpreter's start, without waiting for busy cores
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert all(name in done.stdout for name in cli.COMMANDS)
    assert float(done.stderr) < 0.5


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command_imports_no_torch(name):
    code = (
        "import sys\nfrom llada_megatron import cli\n"
        f"try: cli.main([{name!r}, '--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"usage: llada {name}" in done.stdout and "--json" in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"llada {__version__}\n"


def test_no_command_shows_help_on_stderr(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "commands:" in err


@pytest.mark.parametrize(
    ("word", "hint"), [("trian", "did you mean 'train'?"), ("xyz", "commands: prepare, init, train")]
)
def test_an_unknown_command_names_the_nearest(capsys, word, hint):
    assert cli.main([word]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: unknown command {word!r}; {hint}")


def test_wrong_options_exit_with_2(capsys, command):
    command(lambda args: 0)
    with pytest.raises(SystemExit) as caught:
        cli.main(["probe", "--nothing"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --nothing" in capsys.readouterr().err


def test_options_may_stand_between_overrides(command):
    seen = []
    command(lambda args: seen.append((args.words, args.json)) or 0)
    assert cli.main(["probe", "a", "--json", "b=1"]) == 0
    assert seen == [(["a", "b=1"], True)]


@pytest.mark.parametrize(
    ("failure", "code"),
    [(ConfigError("x.yaml:1: wrong"), 2), (DataError("wrong"), 1), (OSError(28, "No space left"), 1)],
)
def test_an_error_is_one_message_and_an_exit_code(capsys, command, failure, code):
    command(raising(failure))
    assert cli.main(["probe"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {failure}\n")


@pytest.mark.parametrize("way", ["option before", "option after", "environment"])
def test_the_stack_trace_is_there_when_asked_for(capsys, command, monkeypatch, way):
    command(raising(DataError("wrong")))
    if way == "environment":
        monkeypatch.setenv("LLADA_TRACEBACK", "1")
    words = {"option before": ["--traceback", "probe"], "option after": ["probe", "--traceback"]}.get(way, ["probe"])
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: wrong\n")


def test_a_defect_keeps_its_stack_trace(capsys, command):
    command(raising(ZeroDivisionError("oops")))
    assert cli.main(["probe"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "please report it" in err and err.endswith("oops\n")


def test_an_error_under_json_is_an_object_too(capsys, command):
    command(raising(ConfigError("wrong")))
    assert cli.main(["probe", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {"error": "wrong", "exit_code": 2}


def test_ctrl_c_exits_with_130(capsys, command):
    command(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_in_a_real_process():
    code = (
        "import sys, time, types\nfrom llada_megatron import cli\n"
        "def run(args):\n    print('started', flush=True)\n    time.sleep(60)\n"
        "sys.modules['probe'] = types.SimpleNamespace(run=run, add_arguments=lambda parser: None)\n"
        "cli.COMMANDS['probe'] = ('probe', '')\nsys.exit(cli.main(['probe']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_a_reader_that_leaves_is_no_error():
    command = [*LLADA, "inspect", "llada2-flash"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 141
    assert err == ""


def test_another_broken_pipe_is_an_error(capsys, command):
    command(raising(BrokenPipeError(32, "Broken pipe")))
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(True, None, True), (True, "1", False), (False, None, False)]
)
def test_colour_only_on_a_terminal_that_wants_it(monkeypatch, terminal, no_color, coloured):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    assert ("\033[" in console.coloured("text", console.RED, stream)) is coloured


def test_the_installed_program_is_this_one():
    done = subprocess.run(
        [*LLADA, "env", "--help"], capture_output=True, text=True, timeout=60, env={**os.environ, "NO_COLOR": "1"}
    )
    assert done.returncode == 0 and "examples:" in done.stdout


def test_sizes_for_people():
    sizes = {12: "12 bytes", 1_500: "1.5 KB", 9_566_000_000: "9.57 GB", 999.9e9: "1000 GB", 5.757e12: "5.76 TB"}
    assert [console.size_text(count) for count in sizes] == list(sizes.values())


@pytest.mark.parametrize("words", [["train"], ["convert", "import"], ["bench", "parity", "--only", "x"]])
def test_every_command_has_its_version(capsys, words):
    assert cli.main([*words, "--version"]) == 0
    assert capsys.readouterr().out == f"llada {__version__}\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("llada tra", {"train "}),
        ("llada train ar-", {"ar-to-diffusion "}),
        ("llada train demo training.st", {"training.steps="}),
        ("llada convert exp", {"export "}),
    ],
)
def test_the_shell_is_told_how_a_line_may_go_on(tmp_path, line, expected):
    """A process each: argcomplete takes descriptors 8 and 9 for itself, as the shell's function opens them."""
    variables = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    variables["_ARGCOMPLETE_STDOUT_FILENAME"] = str(tmp_path / "answer")
    subprocess.run(LLADA, cwd=tmp_path, env=os.environ | variables, capture_output=True, timeout=60, check=True)
    assert set((tmp_path / "answer").read_text().splitlines()) == expected


def _distribution(direct_url, *urls):
    described = email.message.Message()
    for url in urls:
        described["Project-URL"] = url
    return SimpleNamespace(metadata=described, read_text=lambda name: direct_url)


def test_where_a_defect_is_reported(monkeypatch):
    home, bugs = "Homepage, https://example.org/llada", "Issues, https://example.org/llada/issues"
    vcs = '{"url": "https://example.org/fork", "vcs_info": {"vcs": "git"}}'
    cases = {
        (vcs, home, bugs): "at https://example.org/llada/issues,",
        (None, home): "at https://example.org/llada,",
        (vcs,): "at https://example.org/fork,",
        ('{"url": "file:///home/me", "dir_info": {}}',): "to whoever gave you this copy",
        ("not JSON",): "to whoever gave you this copy",
    }
    for case, expected in cases.items():
        monkeypatch.setattr(report_address.metadata, "distribution", lambda name, case=case: _distribution(*case))
        assert expected in report_address.how_to_report() and "llada env" in report_address.how_to_report()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_program_lets_it_clean_up(capsys, number):
    cleaned = []

    def command():
        try:
            os.kill(os.getpid(), number)
            return 0
        finally:
            cleaned.append(signal.getsignal(number))

    assert cli.guarded(command, SimpleNamespace(json=False, traceback=False)) == 128 + number
    assert capsys.readouterr().err == f"ended by {number.name}\n"
    assert cleaned == [signal.SIG_DFL] and signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so():
    """As `nohup` wants it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.guarded(lambda: os.kill(os.getpid(), signal.SIGHUP) or 0, SimpleNamespace(json=False)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_a_command_is_imported(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["env"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"
