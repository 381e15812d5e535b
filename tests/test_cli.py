"""The command ``medley``."""

import pytest

from pretrain.cli import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_own_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"medley {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "no/such.txt", "--out", "x"],
        ["export", "no/such/run"],
        ["report", "no/such/run"],
        ["evaluate", "no/such/model", "--task", "no/such/task"],
        ["soup", "no/such/run", "no/such/export"],
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"medley {arguments[0]}: error: ") and len(captured.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_exit_code_two(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prepar"])
    assert stop.value.code == 2
    assert "prepare" in capsys.readouterr().err


def test_an_unknown_option_shows_the_usage_of_its_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--bogus"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: medley bench ") and error.endswith("unrecognized arguments: --bogus\n")
