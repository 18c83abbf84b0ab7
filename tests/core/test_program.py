"""What every program does around its work: one message, the exit status."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycon.core import program
from raycon.core.config import ConfigError


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError(["a = 1: give 2"]), 2, "raycon.x: "),
        (OSError("disk"), 1, "raycon.x: OSError: disk\nParts are kept.\n(--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "raycon.x: stopped. Parts are kept.\n"),
    ],
)
def test_one_message_and_the_exit_status(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(arguments: list[str]) -> int:
        assert arguments == ["one"]
        raise error

    assert program.run("raycon.x", work, ["one"], kept="Parts are kept.") == status
    assert capsys.readouterr().err.startswith(said)
    if status != 130:
        with pytest.raises(type(error)):
            program.run("raycon.x", work, ["one", "--debug"], kept="Parts are kept.")


def test_errors_of_our_own_are_never_hidden() -> None:
    def work(arguments: list[str]) -> int:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        program.run("raycon.x", work, [])


def test_the_run_of_a_checkpoint(tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "00000010"
    step.mkdir(parents=True)
    assert program.run_of(tmp_path / "run") is None
    (tmp_path / "run" / "config.yaml").write_text("")
    (step.parent / "last").symlink_to(step.name)
    for place in (tmp_path / "run", step, step.parent / "last"):
        assert (program.run_of(place) or Path()).resolve() == (tmp_path / "run").resolve()
    assert program.run_of(tmp_path / "net.pth") is None
