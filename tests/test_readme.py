"""README and the pages in docs/ are true in both languages: code runs, settings load, and commands and links exist."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from running import asked

from tokencore import Settings
from tokencore.commands import parsers
from tokencore.sandbox import APP_KEY, APP_SECRET, Sandbox

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (*ROOT.glob("README*.md"), *sorted(DOCS.glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
TRANSLATED = [name for name in PAGES if name.replace(".md", ".ko.md") in PAGES]
ENGLISH = [name for name in PAGES if not name.endswith(".ko.md")]
BLOCK = re.compile(r"^```([\w -]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = {name: BLOCK.findall(text) for name, text in TEXTS.items()}
MAKEFILE, EXAMPLE = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", ".env.example"))
# Not in .env.example: what `exec` sets for a program, what .env cannot give, and the beginnings of names.
OUTSIDE = {"KIS_ACCESS_TOKEN", "KIS_TOKEN_EXPIRES_AT", "KIS_SECRETS_DIR", "KIS_MARKETS__"}
RUN = {"sh", "python"}  # languages whose blocks are run; "console" blocks need more than one machine has
# make's targets are proved by the tests of what they start; here `make up` only issues, as a warm-up does.
NEWCOMER = """\
make() {
    command make --dry-run --directory "$ROOT" "$@" > /dev/null
    test "$1" != up || tokencore get kr > /dev/null
}
"""
KEYS = {"PSyourAppKeyOf36Characters": APP_KEY, "yourAppSecretOf180Characters": APP_SECRET}
EARLY = {"need", "needs", "anchor", "cool-down", "ceiling"}  # words that the README would have to explain


@pytest.mark.parametrize("page", [name for name in ENGLISH if RUN & {language for language, _ in BLOCKS[name]}])
def test_a_newcomer_follows_the_page(page: str, gateway: Sandbox) -> None:
    """Its shell and Python blocks, run in order in one home, all succeed and cost at most one issue."""
    Path(".venv").symlink_to(sys.prefix)
    mine = {"KIS_HTS_ID": "me", "ROOT": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    known = {**os.environ, **mine}
    if page == "README.md":  # the reader starts without credentials
        known = {name: value for name, value in known.items() if not name.startswith("KIS_APP_")}
    for language, code in BLOCKS[page]:
        for placeholder, value in KEYS.items():
            code = code.replace(placeholder, value)  # noqa: PLW2901 - as the reader does
        start = {"sh": ["/bin/sh", "-euc", NEWCOMER + code], "python": [sys.executable, "-c", code]}.get(language)
        if start:
            ran = subprocess.run(start, env=known, capture_output=True, text=True, check=False, timeout=60)
            assert ran.returncode == 0, code + ran.stderr
    assert asked(gateway) <= 1


@pytest.mark.parametrize("page", ENGLISH)
def test_settings_that_a_page_shows_load(page: str, isolated: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Settings are read from a page's TOML and environment blocks without a warning."""
    (isolated / ".tokencore").mkdir(mode=0o700)
    before = dict(os.environ)
    for language, code in BLOCKS[page]:
        if language == "toml":
            (isolated / ".tokencore" / "config.toml").write_text(code, encoding="utf-8")
        if language == "ini":
            os.environ.update(line.partition(" #")[0].strip().split("=", 1) for line in code.splitlines())
        Settings.load()
        os.environ.clear()
        os.environ.update(before)
    assert not caplog.records


@pytest.mark.parametrize("page", PAGES)
def test_commands_options_targets_and_settings_exist(page: str) -> None:
    """Every command, option, make target and setting that a page names exists."""
    options = {name: set(one._option_string_actions) for name, one in parsers()[1].items()}  # noqa: SLF001 - argparse has no other way
    for name, rest in re.findall(r"(?<![\w/.-])tokencore ([a-z]+)\b([^\n`|]*)", _code(TEXTS[page])):
        assert name in options, name
        assert {*re.findall(r"(?<=\s)--[a-z-]+", rest.partition(" -- ")[0])} <= options[name], (name, rest)
    assert {*re.findall(r"(?<!`)`(--[a-z-]+)", TEXTS[page])} <= set().union(*options.values())
    for target in re.findall(r"(?:^|[`\s])make ([a-z-]+)", _code(TEXTS[page])):
        assert re.search(rf"^{target}\b|^[a-z -]*\b{target}\b[a-z -]*:", MAKEFILE, re.MULTILINE), target
    assert _settings(TEXTS[page]) <= OUTSIDE | _settings(EXAMPLE)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Every file and every heading that a page links to exists."""
    for target in re.findall(r"\]\((?!\w+://)([^)\s]+)\)", TEXTS[page]):
        name, _, heading = target.partition("#")
        found = PAGES[page].parent / name if name else PAGES[page]
        titles = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert (found.exists(), heading in ["", *slugs]) == (True, True), target


@pytest.mark.parametrize("page", TRANSLATED)
def test_both_languages_say_the_same(page: str) -> None:
    """A page and its Korean twin have the same code, commands, settings, links, tables and sections."""
    korean = page.replace(".md", ".ko.md")
    assert _facts(TEXTS[korean]) == _facts(TEXTS[page])


def test_pages_keep_their_size() -> None:
    """The README has at most 900 words and none of the rule's terms; the English pages have at most 7,000 words."""
    words = TEXTS["README.md"].lower().split()
    assert len(words) <= 900
    assert not {word.strip(".,;:()") for word in words} & EARLY
    assert sum(len(TEXTS[name].split()) for name in ENGLISH if name.startswith("docs/")) <= 7000


def test_samples_of_alerts_are_current() -> None:
    """The alerts that the pages show are those that the code writes today; `make docs` brings them up to date."""
    made = runpy.run_path(str(DOCS / "alerts.py"))
    texts = [path.read_text(encoding="utf-8") for path in made["PAGES"]]
    assert texts == [made["current"](text) for text in texts], "run `make docs`"


def _settings(text: str) -> set[str]:
    """Return the settings that a text names; those of any one market count as `hk`'s."""
    return set(re.findall(r"\b(?:KIS|SLACK)_\w+", re.sub(r"(?<=KIS_MARKETS__)[A-Z]+(?=__)", "HK", text)))


def _code(text: str) -> str:
    """Return a text's code blocks and inline code, without comments."""
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", BLOCK.sub("", text))
    return re.sub(r"(?<=\s)# .*", "", "\n".join([*(code for _, code in BLOCK.findall(text)), *inline]))


def _facts(text: str) -> dict[str, object]:
    """Return what a page has in common with its translation: everything but prose, comments and alerts."""
    rest = BLOCK.sub("", text)
    links = re.findall(r"\]\(([^)\s#]+)", rest)
    return {
        "blocks": [_code(f"```{kind}\n{code}```\n") for kind, code in BLOCK.findall(text) if kind != "text"],
        "inline": {span.replace("\\|", "|") for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", rest)},
        "tables": [line.replace("\\|", "").count("|") for line in rest.splitlines() if line.startswith("|")],
        "links": sorted(link.replace(".ko.md", ".md") for link in links if "README" not in link),
        "sections": [len(level) for level in re.findall(r"^(#+) ", rest, re.MULTILINE)],
    }
