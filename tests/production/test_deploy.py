"""`make deploy`, the commands that start a run, and refusals before a run exists."""

import re
import subprocess
import time

import httpx
import pytest
import yaml

from tasks.stages import STAGES
from tests.production.site import ROOT
from tests.servers import PATIENCE

pytestmark = [pytest.mark.prefect, pytest.mark.s3]


def deployments(place):
    found = place.api("deployments/filter", limit=50)
    flows = {flow["id"]: flow["name"] for flow in place.api("flows/filter", limit=50)}
    return {f"{flows[d['flow_id']]}/{d['name']}": d for d in found}


def test_everything_is_registered_and_again(place):
    found = deployments(place)
    assert {"rlhf-pipeline/rlhf-pipeline", "retraining/retraining"} < set(found)
    others = {"rlhf-pipeline", "retraining", "restart-lost-runs"}
    assert {name.partition("/")[0] for name in found} - others == {*STAGES, "node"}
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True)
    assert {d["version"] for d in found.values()} == {commit.stdout.strip()}
    assert all("rlhf" in d["tags"] and d["enforce_parameter_schema"] for d in found.values())
    jobs = [d["job_variables"]["env"] for d in found.values()]
    assert jobs == [{"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}] * len(jobs)
    weekly = found["retraining/retraining"]
    assert weekly["schedules"][0]["schedule"]["cron"] == "0 3 * * 1"
    limits = {name: d["global_concurrency_limit"]["limit"] for name, d in found.items()
              if d["global_concurrency_limit"]}  # fmt: skip
    assert limits == {"rlhf-pipeline/rlhf-pipeline": 4, "retraining/retraining": 1}
    automations = [a["name"] for a in place.api("automations/filter", limit=50)]
    triggers = ["retrain when data have landed", "start lost runs again"]
    assert sorted(automations) == sorted([*triggers, "rlhf-zombies"])
    assert "leases outlive its restart" in place.said
    again = place.run("make", "deploy")
    pools, schedules = 3, 2
    assert f"{len(found) + pools + schedules + len(automations)} unchanged\n" in again, again
    assert set(deployments(place)) == set(found)
    assert [a["name"] for a in place.api("automations/filter", limit=50)] == automations


def test_the_scheduler_has_planned_the_retraining(place):
    body = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}, "limit": 200}
    give_up = time.monotonic() + PATIENCE
    while not any("auto-scheduled" in r["tags"] for r in place.api("flow_runs/filter", **body)):
        assert time.monotonic() < give_up, place.server.log.read_text()[-3000:]
        time.sleep(1)  # the server's loop looks once a minute


def test_data_that_have_landed_start_a_retraining(place):
    made = deployments(place)["retraining/retraining"]["id"]
    place.run("prefect", "event", "emit", "rlhf.data.landed", "--resource-id", "rlhf.data.chats")
    give_up = time.monotonic() + PATIENCE
    while True:
        runs = place.api("flow_runs/filter", sort="START_TIME_ASC", limit=200)
        found = [
            r for r in runs
            if r["deployment_id"] == made and "auto-scheduled" not in r["tags"]
        ]  # fmt: skip
        if found or time.monotonic() > give_up:
            break
        time.sleep(0.5)
    (run,) = found
    assert run["parameters"]["preset"] == "quickstart"
    place.cancel(run["id"])


@pytest.mark.parametrize("name", ["rlhf-pipeline", "rlhf-pipeline/rlhf-pipeline"])
def test_the_literal_command_starts_a_run(place, name):
    said = place.run("prefect", "deployment", "run", name, "-p", "preset=quickstart")
    run = place.api(f"flow_runs/{said.partition('UUID: ')[2].split()[0]}")
    assert run["parameters"] == {"preset": "quickstart"}
    assert run["deployment_id"] == deployments(place)["rlhf-pipeline/rlhf-pipeline"]["id"]
    place.cancel(run["id"])


def test_other_commands_are_left_alone(place, tmp_path):
    other = place.run("prefect", "deployment", "run", "other", check=False)
    assert "other" in other
    assert "rlhf-pipeline/rlhf-pipeline" not in other
    inspected = place.run("prefect", "deployment", "inspect", "rlhf-pipeline", check=False)
    assert "Invalid deployment name" in inspected


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"overrides": {"ppo": {"kl_coef": -1}}}, "overrides.ppo.kl_coef"),
        ({"overrides": {"ppo": {"kl_cof": 1}}}, "'kl_cof'"),
        ({"overrides": {"rl_gamma": 2}}, "overrides.rl_gamma"),
        ({"overrides": {"placement": {"train-foo": "gpu"}}}, "'train-foo'"),
        (
            {"overrides": {"placement": {"train-sft": "promote/promote-cpu"}}},
            "overrides.placement['train-sft']",
        ),
        ({"preset": "quickstarts"}, "'quickstarts' is not one of"),
    ],
)
def test_bad_parameters_are_refused_at_submission(place, parameters, said):
    with pytest.raises(httpx.HTTPStatusError, match=re.escape(said)):
        place.submit("rlhf-pipeline", **parameters)


@pytest.mark.parametrize(
    ("parameter", "said"),
    # The command itself refuses the second.
    [('overrides={"ppo": {"kl_cof": 1}}', "'kl_cof'"), ("overide={}", "'overide'")],
)
def test_the_command_shows_what_was_refused(place, parameter, said):
    output = place.run(
        "prefect", "deployment", "run", "rlhf-pipeline", "-p", parameter, check=False
    )
    assert said in " ".join(output.split())
    assert "UUID" not in output


def test_file_repeats_nothing():
    text = (ROOT / "deployments" / "prefect.yaml").read_text()
    tree = yaml.safe_load(text)
    assert len(tree["deployments"]) == len(STAGES) + 5
    assert text.count("job_variables") == 1


@pytest.fixture
def emptied(browser):
    """The browser, without a page afterwards: Prefect's pages are never idle."""
    yield browser
    browser.call("Page.navigate", url="about:blank")


@pytest.mark.browser
def test_the_form_has_every_field_and_sends_only_what_was_chosen(place, emptied):
    made = deployments(place)["rlhf-pipeline/rlhf-pipeline"]["id"]
    base = place.environment["PREFECT_API_URL"].removesuffix("/api")
    emptied.call("Page.navigate", url=f"{base}/deployments/deployment/{made}/run")
    # The page first shows its frame, and the parameters when it has their schema.
    shown = ("Submit", "preset", "quickstart", "overrides", "kl_coef", "placement", "train-policy")
    until(emptied, "document.body.innerText", lambda text: all(word in str(text) for word in shown))
    press = "[...document.querySelectorAll('button')].find(b => b.innerText.trim() == 'Submit')"
    emptied.call("Runtime.evaluate", expression=f"{press}.click()")
    until(emptied, "document.body.innerText", lambda text: "scheduled to start" in str(text))
    newest = place.api("flow_runs/filter", sort="EXPECTED_START_TIME_DESC", limit=50)
    run = next(r for r in newest if r["deployment_id"] == made)
    place.cancel(run["id"])
    sent = run["parameters"]
    assert sent.pop("preset", "none") == "none"
    assert not any(value for value in sent.pop("overrides", {}).values())
    assert not sent


def until(browser, expression, done):
    give_up = time.monotonic() + PATIENCE
    while True:
        answer = browser.call("Runtime.evaluate", expression=expression, returnByValue=True)
        value = answer["result"].get("value")
        if done(value) or time.monotonic() > give_up:
            assert done(value), value
            return value
        time.sleep(0.5)
