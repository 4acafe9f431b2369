"""What bash, zsh and fish themselves offer with the scripts of `tokencore completion`."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from running import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from running import Ran

    Offers = dict[str, set[str]]

OFFERED = {
    "g": {"get"},
    "get ": {"us", "kr", "hk"},
    "get us --form": {"--format"},
    "get us --format ": {"process", "env", "header"},
    "check us k": {"kr"},
    "completion ": {"bash", "zsh", "fish"},
    "export kr --to ": {"mojito2", "python-kis", "kis-auth"},
    "export kr --to mojito2 wo": {"work"},
}
# A zsh tells what it would offer to nobody but the person: here each match is noted as it is added.
ZSH = r"""
PS1=; fpath=($PWD $fpath); autoload -Uz compinit; compinit -u -D
compadd() {
  if [[ ${@[1,(i)(-|--)]} != *-(O|A|D)\ * ]]; then
    local -a found; builtin compadd -O found "$@"; print -rl -- $found >> offered
  fi
  builtin compadd "$@"
}
finish() { print -r -- --end-- >> offered; comppostfuncs=(finish) }
comppostfuncs=(finish)
: > offered
"""


def by_bash(lines: Iterable[str]) -> Offers:
    """Its completion function is called as the shell calls it."""
    return {line: set(_run("bash", _in_bash(line)).split()) for line in lines}


def _in_bash(line: str) -> str:
    words = ["tokencore", *shlex.split(line), *([""] if line.endswith(" ") else [])]
    typed = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}"
    wanted = 'compopt() { :; }; _shtab_tokencore; printf "%s\\n" "${COMPREPLY[@]}"'
    return f"source ./script\n{typed}\n{wanted}"


def by_fish(lines: Iterable[str]) -> Offers:
    """It is asked what it would complete; descriptions follow after a tab."""
    asked = {line: _run("fish", f"source ./script\ncomplete -C {shlex.quote(f'tokencore {line}')}") for line in lines}
    return {line: {offer.split("\t")[0].rstrip("/") for offer in told.splitlines()} for line, told in asked.items()}


def by_zsh(lines: Iterable[str]) -> Offers:
    """An interactive one at a terminal, where Tab is pressed at the end of each line."""
    import pty  # only where there is a zsh

    Path("_tokencore").write_text(Path("script").read_text())
    Path("set-up").write_text(ZSH)
    told, (ours, its) = Path("offered"), pty.openpty()
    os.set_blocking(ours, False)
    env = {**os.environ, "TERM": "dumb"}
    program = [str(shutil.which("zsh")), "-f", "-i"]
    shell = subprocess.Popen(program, stdin=its, stdout=its, stderr=its, start_new_session=True, env=env)
    try:
        os.write(ours, b"source ./set-up\n")
        until(told.exists, within=30)
        return {line: _at(ours, line, told) for line in lines}
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)
        os.close(its)


def _at(terminal: int, line: str, told: Path) -> set[str]:
    def ended() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65_536)  # it would stop where nobody reads its list
        return "--end--" in told.read_text()

    told.write_text("")
    os.write(terminal, f"tokencore {line}\t".encode())
    until(ended, within=30)
    os.write(terminal, b"\x15")  # the line is wiped out
    return set(told.read_text().split()) - {"--end--"}


def _run(shell: str, program: str) -> str:
    ran = subprocess.run([shell, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stderr == ""
    return ran.stdout


@pytest.mark.parametrize("complete", [by_bash, by_zsh, by_fish], ids=["bash", "zsh", "fish"])
def test_a_shell_completes_commands_options_markets_and_folders(
    complete: Callable[[Iterable[str]], Offers], command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real shell, with the script that the command wrote; one of the markets is the settings' own."""
    shell = complete.__name__.removeprefix("by_")
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell} here")
    monkeypatch.setenv("KIS_MARKETS__HK__EXCHANGES", "SEHK")
    Path("script").write_text(command("completion", shell).out)
    Path("work").mkdir()
    assert complete(OFFERED) == OFFERED


def test_another_shell_is_a_usage_error(command: Callable[..., Ran]) -> None:
    """There are scripts for three; each has the markets, also where the shell itself is missing."""
    assert command("completion", "cmd").code == 2
    assert all("us kr" in command("completion", shell).out for shell in ("zsh", "fish"))
