"""prefect.yaml, the rules for every flow and deployment, and the services of systemd and compose, without a server."""

import asyncio
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
from datetime import UTC, date, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
import yaml
from cryptography.fernet import Fernet
from prefect import Flow, Task
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
from tokencore.commands import parsers

ROOT = Path(__file__).parent.parent
FILE: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS: dict[str, dict[str, Any]] = {deployment["name"]: deployment for deployment in FILE["deployments"]}
WARM_UPS = {name: each for name, each in DEPLOYMENTS.items() if each["entrypoint"] == "flows.warm_up.warm_up"}
DEFAULTS = {"KRX", "NASD", "NYSE", "AMEX"}  # the exchanges of the markets `us` and `kr`
WEEKS = [date(2026, 1, 5), date(2026, 3, 2), date(2026, 7, 6), date(2026, 10, 26)]  # two with a clock change
UNITS = sorted((ROOT / "docs" / "systemd").iterdir())
PROGRAMS = {"tokencore": {*parsers()[1]}, "flows.stack": {*stack.COMMANDS}}
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())


def flow_of(name: str) -> Flow[..., Any]:
    """Load a deployment's flow, without the placeholder that Prefect falls back to."""
    return load_flow_from_entrypoint(DEPLOYMENTS[name]["entrypoint"], use_placeholder_flow=False)


def dates(name: str, start: datetime, count: int) -> list[datetime]:
    """Return when Prefect's own scheduler would start the next `count` runs, in UTC."""
    (schedule,) = DEPLOYMENTS[name]["schedules"]
    cron = CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    return [at.astimezone(UTC) for at in asyncio.run(cron.get_dates(count, start=start))]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_keeps_the_rules(name: str) -> None:
    """A deployment gives all its flow's parameters and has no template and no limit, whose slot a killed run keeps."""
    one, flow = DEPLOYMENTS[name], flow_of(name)
    typed = {"refresh_token": {"market": "US", "operator": "Kim"}, "NASD": {"exchange": "xnas"}}.get(name, {})
    parameters = flow.validate_parameters({**one.get("parameters", {}), **typed})
    assert set(parameters) == set(inspect.signature(flow.fn).parameters)
    assert (parameters.get("market", "us"), parameters.get("exchange", name)) == ("us", name)
    assert (FILE["pull"], "{{" in yaml.safe_dump(one)) == ([], False)  # Prefect would store a template's value in clear
    assert "concurrency_limit" not in one
    assert one["tags"]
    variables = {"env": {"PREFECT_LOGGING_EXTRA_LOGGERS": "tokencore"}}
    assert one["work_pool"] == {"name": "tokens", "job_variables": variables}
    assert (flow.persist_result, flow.log_prints, flow.retries) == (False, False, 0)


@pytest.mark.parametrize("name", ["KRX", "check_tokens", "refresh_token"])
def test_a_flow_tells_an_operator_what_to_do(name: str) -> None:
    """A flow's docstring, shown in the UI, names every final state and how to triage; each parameter is described."""
    flow = flow_of(name)
    text = str(flow.description)
    source = (ROOT / f"{flow.fn.__module__.replace('.', '/')}.py").read_text()
    ends = {"Failed", "Triage:", *re.findall(r'Completed\(name="(\w+)"', source)}
    assert ends - set(re.findall(r"\*\*(\w+:?)\*\*", text)) == set()
    assert set(re.findall(r"\]\((/\w+)", text)) <= {"/v2"}  # Prefect's older page has the others
    assert not re.search(r"[^\n]\n[^\n]|Args:", text)  # the page breaks the line there; the form explains parameters
    fields = parameter_schema(flow.fn).properties.values()
    assert all(field.get("description") and field.get("type") for field in fields)


def test_a_task_is_tried_again_only_while_kis_is_down() -> None:
    """Limits, refusals and wrong settings are not retried, and no task stores a result or a cache entry."""
    modules = [f"flows.{module.name}" for module in pkgutil.iter_modules(flows.__path__) if not module.ispkg]
    values = [value for name in modules for value in vars(importlib.import_module(name)).values()]
    tasks = [value for value in values if isinstance(value, Task)]
    assert sorted(task.name for task in tasks) == ["advance", "ensure"]
    for task in tasks:
        assert task.retry_condition_fn is kis_is_down
        assert (task.retries, task.persist_result, task.cache_policy) == (0, False, NO_CACHE)  # `runs` sets its retries


def test_every_exchange_has_its_warm_up() -> None:
    """Schedules are on for the default markets' exchanges only, and the form offers exactly the known exchanges."""
    assert WARM_UPS.keys() == sessions.EXCHANGES.keys()
    assert [each["parameters"]["exchange"] for each in WARM_UPS.values()] == list(WARM_UPS)
    assert parameter_schema(flow_of("KRX").fn).properties["exchange"]["enum"] == list(sessions.EXCHANGES)
    assert {name for name, each in WARM_UPS.items() if each["schedules"][0].get("active", True)} == DEFAULTS
    slugs = [schedule["slug"] for each in DEPLOYMENTS.values() for schedule in each["schedules"]]
    assert len(set(slugs)) == len(slugs) == len(DEPLOYMENTS) - 1  # two with the same slug would overwrite each other


@pytest.mark.parametrize(("language", "do"), [("en", "To do"), ("ko", "조치 사항")])
def test_every_automation_reports_in_each_language_or_acts(language: str, do: str) -> None:
    """Prefect accepts each automation; its message says what to do, and without Slack its description says so."""
    block = uuid4()
    made = deployments.automations(language, block)
    actions = [one.actions[0] for one in made.values()]
    assert [getattr(action, "block_document_id", block) for action in actions] == [block] * 5
    assert [do in action.body for action in actions if action.type == "send-notification"] == [True] * 4
    assert "{{ flow.name }} {{ deployment.name }}" in made["A run is late"].actions[0].subject  # it has no name yet
    silent = deployments.automations(language, None).values()
    assert [deployments.UNHEARD in one.description for one in silent] == [
        one.actions[0].type == "do-nothing" for one in silent
    ]
    expected = made["The hourly check is missing"].trigger.expect
    assert expected == {f"prefect.flow-run.{name}" for name in api.CHECKED}  # as the watchdog and `status` have it


@pytest.mark.parametrize("name", WARM_UPS)
def test_a_warm_up_comes_40_minutes_before_the_open(name: str) -> None:
    """A warm-up is due 40 minutes before each weekday's open in the exchange's zone, also across clock changes."""
    place, (schedule,) = sessions.exchange(name), WARM_UPS[name]["schedules"]
    zone = ZoneInfo(place.zone)
    assert schedule["timezone"] == place.zone
    for week in WEEKS:
        days = [week + timedelta(days=n) for n in range(14) if n % 7 < 5]  # weeks begin on Mondays
        opens = [datetime.combine(day, place.open, zone).astimezone(UTC) for day in days]
        begin = datetime.combine(week, datetime.min.time(), zone)
        assert dates(name, begin, 10) == [at - timedelta(minutes=40) for at in opens]


def test_the_check_comes_every_hour_of_the_year() -> None:
    """The check comes each hour at the minute that alerts announce, also when New York's clocks are set back."""
    begin = datetime(2026, 10, 31, tzinfo=UTC)
    assert dates("check_tokens", begin, 48) == [begin + timedelta(hours=n, minutes=CHECK_MINUTE) for n in range(48)]


@pytest.mark.parametrize("file", [*UNITS, ROOT / "compose.yaml"], ids=lambda file: file.name)
def test_every_command_of_a_service_is_there(file: Path) -> None:
    """Services run only commands that exist, their settings file is optional, and each timer has its service."""
    text = re.sub(r"^ *#.*", "", file.read_text(), flags=re.MULTILINE)
    commands = re.findall(r"(tokencore|flows\.stack)[\", ]+([a-z]\S+?)\b", text)
    modules = re.findall(r"-m (flows\.stack\.\w+)", text)
    assert all(command in PROGRAMS[module] for module, command in commands), commands
    assert all(map(find_spec, modules)), modules
    assert "prefect worker start" not in text  # Prefect's own worker keeps the secrets of a run in a file meanwhile
    if file.suffix == ".timer":
        assert file.with_suffix(".service") in UNITS
    elif file in UNITS:
        assert commands or modules
        assert "\nEnvironmentFile=-" in text
        assert "\nLimitCORE=0\n" in text  # a core dump would hold secrets


def test_services_of_compose_have_no_privileges_and_listen_on_loopback() -> None:
    """Services have no privileges, listen on loopback and get the secrets they read; heartbeats suit the automation."""
    services = COMPOSE["services"]
    for one in services.values():
        read = re.findall(r"/run/secrets/(\w+)", f"{one.get('command')} {one.get('environment')}")
        assert set(read) <= set(one.get("secrets", [])) <= COMPOSE["secrets"].keys()
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", []))
        if one["image"] == "tokencore":
            safe = (["ALL"], ["no-new-privileges:true"], True)
            assert (one["cap_drop"], one["security_opt"], one["read_only"]) == safe
            assert one["environment"]["KIS_SECRETS_DIR"] == "/run/secrets"
    beat = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
    assert services["worker"]["environment"][beat] == environment.DEFAULTS[beat]


def test_the_setup_of_compose_makes_every_secret_for_its_readers_alone(tmp_path: Path) -> None:
    """The commands in compose.yaml's head work as they are: passwords differ, and Fernet accepts the store's key."""
    lines = re.findall(r"^#   (.+)", (ROOT / "compose.yaml").read_text(), re.MULTILINE)
    setup = "\n".join(line for line in lines if not line.startswith("docker"))
    given = {"PATH": os.environ["PATH"], "KIS_APP_KEY": "key", "KIS_APP_SECRET": "secret"}
    subprocess.run(["/bin/sh", "-euc", f"umask 077\n{setup}"], env=given, cwd=tmp_path, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert made.keys() == COMPOSE["secrets"].keys() - {"PREFECT_API_AUTH_STRING"}  # made by the server's first start
    assert len({made[name] for name in made if name != "SLACK_WEBHOOK_URL"}) == len(made) - 1
    assert Fernet(made["KIS_STORE_KEYS"]).encrypt(b"a token")
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
