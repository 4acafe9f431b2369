"""prefect.yaml and the house rules that hold for every flow and deployment; no server needed."""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import pkgutil
import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.flows import load_flow_from_entrypoint
from prefect.server.schemas.schedules import CronSchedule
from prefect.utilities.callables import parameter_schema

import flows
from flows.alerts import CHECK_MINUTE
from flows.refresh_token import Market
from flows.runs import kis_is_down
from flows.stack import api, deployments
from flows.warm_up import Exchange
from tokencore import sessions

if TYPE_CHECKING:
    from prefect import Flow

ROOT = Path(__file__).parent.parent
FILE: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS: dict[str, dict[str, Any]] = {deployment["name"]: deployment for deployment in FILE["deployments"]}
WARM_UPS = {name: each for name, each in DEPLOYMENTS.items() if each["entrypoint"] == "flows.warm_up.warm_up"}
DEFAULTS = {"KRX", "NASD", "NYSE", "AMEX"}  # what the markets `us` and `kr` trade
WEEKS = (
    date(2026, 1, 5),
    date(2026, 3, 2),
    date(2026, 7, 6),
    date(2026, 10, 26),
)  # winter, summer, and around both changes

every_deployment = pytest.mark.parametrize("name", DEPLOYMENTS)


def flow_of(name: str) -> Flow[..., Any]:
    """The flow of a deployment, loaded strictly."""
    return load_flow_from_entrypoint(DEPLOYMENTS[name]["entrypoint"], use_placeholder_flow=False)


def dates(schedule: dict[str, Any], start: datetime, count: int) -> list[datetime]:
    """When Prefect's own scheduler would start the next `count` runs."""
    cron = CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    return [*asyncio.run(cron.get_dates(count, start=start))]


@every_deployment
def test_a_deployment_loads_and_its_parameters_validate(name: str) -> None:
    """Every entrypoint is a flow of an installed module, and what the deployment gives fits it."""
    given = {"market": "us", "operator": "Kim"} if name == "refresh_token" else {}
    parameters = flow_of(name).validate_parameters({**DEPLOYMENTS[name].get("parameters", {}), **given})
    assert set(parameters) == set(inspect.signature(flow_of(name).fn).parameters)


@every_deployment
def test_a_deployment_has_no_limit(name: str) -> None:
    """The key's lock makes one request of whatever runs at once; a slot would stay taken by a run that was killed."""
    assert "concurrency_limit" not in DEPLOYMENTS[name]


@every_deployment
def test_a_deployment_tells_an_operator_what_to_do(name: str) -> None:
    """It has tags, its flow's text as a description, with a triage note, and every parameter explains itself."""
    flow = flow_of(name)
    assert DEPLOYMENTS[name]["tags"]
    assert "description" not in DEPLOYMENTS[name]  # then Prefect takes the flow's
    assert flow.description
    assert "**Triage:**" in flow.description
    assert "Args:" not in flow.description  # the form shows them
    assert not re.search(r"[^\n]\n[^\n]", flow.description)  # the page would break the line there
    fields = parameter_schema(flow.fn).properties.values()
    assert all(field.get("description") and field.get("type") for field in fields)


@every_deployment
def test_a_deployment_leaves_no_secret_and_no_path_behind(name: str) -> None:
    """Prefect resolves templates when it deploys and stores them in clear: there are none. Nothing is pulled."""
    assert FILE["pull"] == []
    assert "{{" not in yaml.safe_dump(DEPLOYMENTS[name])
    variables = {"env": {"PREFECT_LOGGING_EXTRA_LOGGERS": "tokencore"}}
    assert DEPLOYMENTS[name]["work_pool"] == {"name": "tokens", "job_variables": variables}


@every_deployment
def test_a_flow_keeps_nothing_and_is_not_repeated_as_a_whole(name: str) -> None:
    """No persisted results, no captured prints; only the task that asks KIS is tried again."""
    flow = flow_of(name)
    assert flow.persist_result is False
    assert flow.log_prints is False
    assert flow.retries == 0


def tasks() -> list[Any]:
    """Every task that a module of `flows` makes."""
    names = [f"flows.{module.name}" for module in pkgutil.iter_modules(flows.__path__) if not module.ispkg]
    made = [value for name in names for value in vars(importlib.import_module(name)).values()]
    return [value for value in made if isinstance(value, Task)]


@pytest.mark.parametrize("task", tasks(), ids=lambda task: str(task.name))
def test_a_task_is_tried_again_only_while_kis_is_down(task: Any) -> None:  # noqa: ANN401 - a task with any parameters
    """Its condition lets limits, refusals and settings be, its pauses outlast the cool-down, nothing is kept."""
    assert task.retry_condition_fn is kis_is_down
    assert task.retries == 0  # `runs.each_key` gives it pauses that outlast the key's own issue interval
    assert task.persist_result is False
    assert task.cache_policy is NO_CACHE


@every_deployment
def test_every_schedule_names_its_zone(name: str) -> None:
    """A cron without a zone would mean the server's."""
    assert all(ZoneInfo(schedule["timezone"]) for schedule in DEPLOYMENTS[name]["schedules"])


@every_deployment
def test_every_end_of_a_flow_is_explained(name: str) -> None:
    """The text in the page says what the run does, how it ends and what to do then."""
    text = str(flow_of(name).description)
    source = (ROOT / f"{flow_of(name).fn.__module__.replace('.', '/')}.py").read_text()
    used = {"Failed", *re.findall(r'Completed\(name="(\w+)"', source)}
    assert "Ends as" in text
    assert used - set(re.findall(r"\*\*(\w+)\*\*", text)) == set()


def test_every_exchange_has_its_warm_up() -> None:
    """Those of the default markets are on, the others off, and the form offers exactly the table's exchanges."""
    assert set(WARM_UPS) == set(sessions.EXCHANGES) == set(get_args(Exchange))
    assert all(each["parameters"] == {"exchange": name} for name, each in WARM_UPS.items())
    assert parameter_schema(flow_of("KRX").fn).properties["exchange"]["enum"] == list(sessions.EXCHANGES)
    on = {name for name, each in WARM_UPS.items() if each["schedules"][0].get("active", True)}
    assert on == DEFAULTS


@pytest.mark.parametrize("traded", [{"KRX"}, {"SEHK", "NASD"}, set()])
def test_the_settings_decide_which_warm_ups_there_are(traded: set[str]) -> None:
    """Those of the exchanges that are traded, on their schedules; the check and the form always."""
    table = deployments.by_settings(copy.deepcopy(FILE), traded)
    made = {one["name"]: one for one in table["deployments"]}
    assert set(made) == traded | {"check_tokens", "refresh_token"}
    assert all(schedule.get("active", True) for one in made.values() for schedule in one["schedules"])
    assert not any("off" in one["tags"] for one in made.values())


@pytest.mark.parametrize("language", ["en", "ko"])
def test_every_automation_reports_in_each_language_or_acts(language: str) -> None:
    """Prefect takes each of them; its message has a headline and what to do, and without a way to Slack it says so."""
    block = uuid4()
    made = deployments.automations(language, block)
    actions = {name: one.actions[0] for name, one in made.items()}
    assert all(getattr(action, "block_document_id", block) == block for action in actions.values())
    said = [action.body for action in actions.values() if action.type == "send-notification"]
    assert len(said) == 4
    assert all(("조치 사항" if language == "ko" else "To do") in body for body in said)
    silent = deployments.automations(language, None)
    assert [one.actions[0].type for one in silent.values()].count("do-nothing") == 4
    assert sum(deployments.UNHEARD in one.description for one in silent.values()) == 4


def test_what_counts_as_a_check_is_the_same_everywhere() -> None:
    """The automation that misses the hourly check, the watchdog and `status` know the same ends of it."""
    (missing,) = (one for one in deployments.automations("en", None).values() if "check is missing" in one.name)
    assert missing.trigger.expect == {f"prefect.flow-run.{name}" for name in api.CHECKED}


def test_slugs_name_one_schedule_each() -> None:
    """A schedule is known by its slug across deploys; two with one would overwrite each other."""
    slugs = [schedule["slug"] for each in DEPLOYMENTS.values() for schedule in each["schedules"]]
    assert len(set(slugs)) == len(slugs) == len(DEPLOYMENTS) - 1


@pytest.mark.parametrize("week", WEEKS, ids=str)
@pytest.mark.parametrize("name", WARM_UPS)
def test_a_warm_up_comes_40_minutes_before_the_open(name: str, week: date) -> None:
    """On every weekday of two weeks, winter and summer and across the changes of the clock, in the exchange's zone."""
    place, (schedule,) = sessions.exchange(name), WARM_UPS[name]["schedules"]
    assert schedule["timezone"] == place.zone
    zone = ZoneInfo(place.zone)
    begin = datetime.combine(week, datetime.min.time(), zone)
    weekdays = [week + timedelta(days=n) for n in range(14) if (week + timedelta(days=n)).weekday() < 5]
    opens = [datetime.combine(day, place.open, zone).astimezone(UTC) for day in weekdays]
    assert [at.astimezone(UTC) for at in dates(schedule, begin, 10)] == [at - timedelta(minutes=40) for at in opens]


def test_the_check_comes_every_hour_of_the_year() -> None:
    """In UTC, at the minute that alerts announce, also on the night on which New York's clocks are set back."""
    (schedule,) = DEPLOYMENTS["check_tokens"]["schedules"]
    begin = datetime(2026, 10, 31, tzinfo=UTC)
    expected = [begin + timedelta(hours=n, minutes=CHECK_MINUTE) for n in range(48)]
    assert [at.astimezone(UTC) for at in dates(schedule, begin, 48)] == expected


def test_the_form_of_a_refresh_has_drop_downs() -> None:
    """A market is chosen, force is a switch, name and reason are short words; a manual run has no schedule."""
    fields = parameter_schema(flow_of("refresh_token").fn).properties
    assert fields["market"]["enum"] == list(get_args(get_args(Market)[0]))
    assert fields["force"]["type"] == "boolean"
    assert (fields["reason"]["type"], fields["reason"]["maxLength"]) == ("string", 80)
    assert fields["operator"]["type"] == "string"
    assert fields["reason"]["pattern"] == fields["operator"]["pattern"]
    assert DEPLOYMENTS["refresh_token"]["schedules"] == []
