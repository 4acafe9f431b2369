"""prefect.yaml, the house rules of every flow and deployment, and the systemd units; no server needed."""

from __future__ import annotations

import asyncio
import configparser
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
import yaml
from cryptography.fernet import Fernet
from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.flows import load_flow_from_entrypoint
from prefect.server.schemas.schedules import CronSchedule
from prefect.utilities.callables import parameter_schema

import flows
from flows.alerts import CHECK_MINUTE
from flows.runs import kis_is_down
from flows.stack import __main__ as stack
from flows.stack import api, deployments, environment
from tokencore import sessions
from tokencore.cli import COMMANDS
from tokencore.commands import parsers

if TYPE_CHECKING:
    from prefect import Flow

ROOT = Path(__file__).parent.parent
FILE: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS: dict[str, dict[str, Any]] = {deployment["name"]: deployment for deployment in FILE["deployments"]}
WARM_UPS = {name: each for name, each in DEPLOYMENTS.items() if each["entrypoint"] == "flows.warm_up.warm_up"}
DEFAULTS = {"KRX", "NASD", "NYSE", "AMEX"}  # what the markets `us` and `kr` trade
WEEKS = [date(2026, 1, 5), date(2026, 3, 2), date(2026, 7, 6), date(2026, 10, 26)]  # two around changes of clocks
UNITS = sorted((ROOT / "docs" / "systemd").iterdir())
COMMAND = re.compile(r"-?%h/tokencore/\.venv/bin/python -m (\S+) (\S+)( start --pool tokens --type process --name %H)?")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())

every_deployment = pytest.mark.parametrize("name", DEPLOYMENTS)


def flow_of(name: str) -> Flow[..., Any]:
    """The flow of a deployment, loaded strictly."""
    return load_flow_from_entrypoint(DEPLOYMENTS[name]["entrypoint"], use_placeholder_flow=False)


def dates(schedule: dict[str, Any], start: datetime, count: int) -> list[datetime]:
    """When Prefect's own scheduler would start the next `count` runs, in UTC."""
    cron = CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    return [at.astimezone(UTC) for at in asyncio.run(cron.get_dates(count, start=start))]


@every_deployment
def test_a_deployment_keeps_the_rules(name: str) -> None:
    """It loads, and what it gives fits its flow; no limit, whose slot a killed run would keep; nothing is pulled.

    Prefect resolves templates when it deploys and stores them in clear: there are none. Every schedule has a zone.
    """
    one = DEPLOYMENTS[name]
    given = {"market": "us", "operator": "Kim"} if name == "refresh_token" else {}
    parameters = flow_of(name).validate_parameters({**one.get("parameters", {}), **given})
    assert set(parameters) == set(inspect.signature(flow_of(name).fn).parameters)
    assert "concurrency_limit" not in one
    assert (FILE["pull"], "{{" in yaml.safe_dump(one)) == ([], False)
    variables = {"env": {"PREFECT_LOGGING_EXTRA_LOGGERS": "tokencore"}}
    assert one["work_pool"] == {"name": "tokens", "job_variables": variables}
    assert all(ZoneInfo(schedule["timezone"]) for schedule in one["schedules"])


@every_deployment
def test_a_deployment_tells_an_operator_what_to_do(name: str) -> None:
    """It has tags, its flow's text as a description, with every end and a triage note; parameters explain themselves.

    Nothing is persisted, no print captured, and no flow repeated as a whole: only its task asks KIS again.
    """
    flow = flow_of(name)
    assert DEPLOYMENTS[name]["tags"]
    assert "description" not in DEPLOYMENTS[name]  # then Prefect takes the flow's
    text = str(flow.description)
    assert not [part for part in ("**Triage:**", "Ends as") if part not in text]
    assert "Args:" not in text  # the form shows them
    assert not re.search(r"[^\n]\n[^\n]", text)  # the page would break the line there
    source = (ROOT / f"{flow.fn.__module__.replace('.', '/')}.py").read_text()
    ends = {"Failed", *re.findall(r'Completed\(name="(\w+)"', source)}
    assert ends - set(re.findall(r"\*\*(\w+)\*\*", text)) == set()
    fields = parameter_schema(flow.fn).properties.values()
    assert all(field.get("description") and field.get("type") for field in fields)
    assert (flow.persist_result, flow.log_prints, flow.retries) == (False, False, 0)


def test_a_task_is_tried_again_only_while_kis_is_down() -> None:
    """Its condition lets limits, refusals and settings be, its pauses outlast the cool-down, nothing is kept."""
    modules = [f"flows.{module.name}" for module in pkgutil.iter_modules(flows.__path__) if not module.ispkg]
    values = [value for name in modules for value in vars(importlib.import_module(name)).values()]
    tasks = [value for value in values if isinstance(value, Task)]
    assert sorted(task.name for task in tasks) == ["advance", "ensure"]
    for task in tasks:
        assert task.retry_condition_fn is kis_is_down
        assert task.retries == 0  # `runs.each_key` gives it pauses that outlast the key's own issue interval
        assert (task.persist_result, task.cache_policy) == (False, NO_CACHE)


def test_every_exchange_has_its_warm_up() -> None:
    """Those of the default markets are on, the others off, and the form offers exactly the table's exchanges."""
    assert set(WARM_UPS) == set(sessions.EXCHANGES)
    assert all(each["parameters"] == {"exchange": name} for name, each in WARM_UPS.items())
    assert parameter_schema(flow_of("KRX").fn).properties["exchange"]["enum"] == list(sessions.EXCHANGES)
    assert {name for name, each in WARM_UPS.items() if each["schedules"][0].get("active", True)} == DEFAULTS
    slugs = [schedule["slug"] for each in DEPLOYMENTS.values() for schedule in each["schedules"]]
    assert len(set(slugs)) == len(slugs) == len(DEPLOYMENTS) - 1  # two with one slug would overwrite each other


@pytest.mark.parametrize(("language", "do"), [("en", "To do"), ("ko", "조치 사항")])
def test_every_automation_reports_in_each_language_or_acts(language: str, do: str) -> None:
    """Prefect takes each of them; its message has a headline and what to do, and without a way to Slack it says so.

    The one that misses the hourly check, the watchdog and `status` know the same ends of it.
    """
    block = uuid4()
    made = deployments.automations(language, block)
    actions = [one.actions[0] for one in made.values()]
    assert all(getattr(action, "block_document_id", block) == block for action in actions)
    said = [action.body for action in actions if action.type == "send-notification"]
    assert [do in body for body in said] == [True] * 4
    silent = deployments.automations(language, None).values()
    assert [one.actions[0].type for one in silent].count("do-nothing") == 4
    assert sum(deployments.UNHEARD in one.description for one in silent) == 4
    (missing,) = (one for one in made.values() if "check is missing" in one.name)
    assert missing.trigger.expect == {f"prefect.flow-run.{name}" for name in api.CHECKED}


@pytest.mark.parametrize("name", WARM_UPS)
def test_a_warm_up_comes_40_minutes_before_the_open(name: str) -> None:
    """On every weekday of two weeks, winter and summer and across the changes of the clock, in the exchange's zone."""
    place, (schedule,) = sessions.exchange(name), WARM_UPS[name]["schedules"]
    zone = ZoneInfo(place.zone)
    assert schedule["timezone"] == place.zone
    for week in WEEKS:
        days = [week + timedelta(days=n) for n in range(14) if (week + timedelta(days=n)).weekday() < 5]
        opens = [datetime.combine(day, place.open, zone).astimezone(UTC) for day in days]
        begin = datetime.combine(week, datetime.min.time(), zone)
        assert dates(schedule, begin, 10) == [at - timedelta(minutes=40) for at in opens]


def test_runs_take_other_names_of_an_exchange_and_capitals_of_a_market() -> None:
    """As commands and settings do; the form of the page lists one name of each."""
    for name in ("NASDAQ", "NAS", "xnas"):
        assert flow_of("NASD").validate_parameters({"exchange": name}) == {"exchange": "NASD"}
    assert flow_of("refresh_token").validate_parameters({"market": "US"})["market"] == "us"


def test_the_check_comes_every_hour_of_the_year() -> None:
    """In UTC, at the minute that alerts announce, also on the night on which New York's clocks are set back."""
    (schedule,) = DEPLOYMENTS["check_tokens"]["schedules"]
    begin = datetime(2026, 10, 31, tzinfo=UTC)
    assert dates(schedule, begin, 48) == [begin + timedelta(hours=n, minutes=CHECK_MINUTE) for n in range(48)]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze (Debian's package systemd)")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """`systemd-analyze verify` finds nothing, where the folder is as the units say."""
    program = tmp_path / "tokencore" / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.symlink_to(sys.executable)
    place = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path), "PATH": os.environ["PATH"]}
    verify = ["systemd-analyze", "verify", "--user", "--man=no", *map(str, UNITS)]
    done = subprocess.run(verify, env=place, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_every_command_of_a_unit_is_there(unit: Path) -> None:
    """A module of ours with that command; the settings' file is optional; a timer has its service."""
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.read_string(unit.read_text())
    lines = re.findall(r"^ExecStart=(.+)$", unit.read_text(), re.MULTILINE)  # systemd's files have keys more than once
    known = {"tokencore": set(parsers(COMMANDS)[1]), "flows.stack": set(stack.COMMANDS), "prefect": {"worker"}}
    commands = [match.groups()[:2] for line in lines if (match := COMMAND.fullmatch(line))]
    assert len(commands) == len(lines)
    assert all(command in known[module] for module, command in commands)
    if unit.suffix == ".timer":
        assert unit.with_suffix(".service") in UNITS
    else:
        assert commands
        assert read["Service"]["EnvironmentFile"].startswith("-")
        assert read["Service"]["LimitCORE"] == "0"  # it would hold secrets


def test_compose_names_only_what_is_there() -> None:
    """Every secret, volume, config, service and command that a service names; every secret that is read is given.

    All of ours run without privileges; what is published is on loopback; the worker's beat is the automation's.
    """
    services, programs = (
        COMPOSE["services"],
        {"tokencore": set(parsers(COMMANDS)[1]), "flows.stack": set(stack.COMMANDS)},
    )
    for one in services.values():
        secrets, command = one.get("secrets", []), " ".join(one.get("command", []))
        assert set(secrets) <= COMPOSE["secrets"].keys()
        assert {each["source"] for each in one.get("configs", [])} <= COMPOSE["configs"].keys()
        assert {each.split(":")[0] for each in one.get("volumes", [])} <= COMPOSE["volumes"].keys()
        assert one.get("depends_on", {}).keys() <= services.keys()
        assert set(re.findall(r"/run/secrets/(\w+)", f"{command} {one.get('environment')}")) <= set(secrets)
        for program, words in re.findall(r"(tokencore|flows\.stack)[ ,]+(\w+)", command):
            assert words in programs[program]
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", []))
        if one["image"] == "tokencore":
            assert one["cap_drop"] == ["ALL"]
            assert one["security_opt"] == ["no-new-privileges:true"]
            assert one["read_only"]
            assert one["environment"]["KIS_SECRETS_DIR"] == "/run/secrets"
    assert {one["file"] for one in COMPOSE["secrets"].values()} == {f"secrets/{name}" for name in COMPOSE["secrets"]}
    beat = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
    assert services["worker"]["environment"][beat] == environment.DEFAULTS[beat]


def test_the_setup_of_compose_makes_every_secret_for_its_readers_alone(tmp_path: Path) -> None:
    """The lines at its top, run as they are; the passwords differ, and the store's key is one that Fernet takes."""
    lines = re.findall(r"^#   (.+)", (ROOT / "compose.yaml").read_text(), re.MULTILINE)
    setup = "\n".join(line for line in lines if not line.startswith("docker"))
    given = {"PATH": os.environ["PATH"], "KIS_APP_KEY": "key", "KIS_APP_SECRET": "secret"}
    subprocess.run(["/bin/sh", "-euc", f"umask 077\n{setup}"], env=given, cwd=tmp_path, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert made.keys() == COMPOSE["secrets"].keys() - {"PREFECT_API_AUTH_STRING"}  # the server's, known once it runs
    assert len({made[name] for name in made if name != "SLACK_WEBHOOK_URL"}) == len(made) - 1
    assert Fernet(made["KIS_STORE_KEYS"]).encrypt(b"a token")
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700


def test_the_image_takes_all_that_the_package_is_made_of_and_no_address() -> None:
    """Every folder of pyproject.toml, the deployments and the pins are copied; pip's index is the builder's."""
    text = (ROOT / "Dockerfile").read_text()
    copied = {path for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE) for path in line.split()}
    assert copied == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "prefect.yaml", "flows", "tokencore"}
    assert all((ROOT / path).exists() for path in copied)
    assert not re.search(r"https?://(?!127\.0\.0\.1)|index-url", text)
    assert re.search(r"^USER 1000:1000$", text, re.MULTILINE)
