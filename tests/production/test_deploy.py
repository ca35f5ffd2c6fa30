"""`make deploy`, the commands that start a run, and refusals before a run exists."""

import copy
import re
import shutil
import subprocess
import sys
import time

import httpx
import pytest
import yaml

from tasks import deployments as deploying
from tasks.stages import STAGES
from tests.ceph import free_ports
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
    assert {name.partition("/")[0] for name in found} - others == {*STAGES}
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
    assert sorted(automations) == [
        "restart-lost-runs/restart-lost-runs__start lost runs again",
        "retraining/retraining__retrain when data have landed", "rlhf-zombies",
    ] or "rlhf-zombies" in automations  # fmt: skip
    assert "leases outlive its restart" in place.said
    place.run("make", "deploy")
    assert set(deployments(place)) == set(found)
    assert [a["name"] for a in place.api("automations/filter", limit=50)] == automations


@pytest.fixture
def elsewhere(place, tmp_path):
    """Function that deploys a copy of the files with an edit, and returns what it said."""
    file, folder = tmp_path / "prefect.yaml", tmp_path / "automations"
    shutil.copytree(deploying.AUTOMATIONS, folder)
    before = yaml.safe_load(deploying.FILE.read_text())
    program = (
        "import sys; from pathlib import Path; from tasks import deployments as d;"
        "d.FILE, d.AUTOMATIONS = Path(sys.argv.pop(1)), Path(sys.argv.pop(1)); sys.exit(d._main())"
    )

    def deploy(edit, *flags):
        tree = copy.deepcopy(before)
        edit(tree, folder)
        file.write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-c", program, str(file), str(folder), *flags]
        return place.run(*command, COLUMNS="200")

    yield deploy
    place.run("make", "deploy")


def test_what_left_the_files_is_gone_and_nothing_else(place, elsewhere):
    by_hand = {"name": "by-hand", "entrypoint": "x.py:x", "tags": ["rlhf"]}
    promote = deployments(place)["promote/cpu"]
    place.api("deployments/", **by_hand, flow_id=promote["flow_id"])
    gate = place.submit("gate-policy/cpu", preset="quickstart")

    def edit(tree, folder):
        gone = "promote|gate_policy"
        kept = [d for d in tree["deployments"] if not re.search(gone, d["entrypoint"])]
        tree["deployments"] = kept
        retraining = next(d for d in kept if d["name"] == "retraining")
        for key in ("schedules", "triggers", "concurrency_limit", "parameters"):
            del retraining[key]
        (folder / "zombies.yaml").unlink(missing_ok=True)

    before = deployments(place)
    planned = elsewhere(edit, "--dry")
    assert deployments(place) == before
    said = elsewhere(edit)
    for text in (planned, said):
        assert re.search(r"removed\W+deployment\W+promote/cpu", text), text
        assert re.search(r"kept\W+deployment\W+gate-policy/cpu.*1 unfinished", text), text
        assert re.search(r"removed\W+automation\W+rlhf-zombies", text), text
    found = deployments(place)
    assert before.keys() - found.keys() == {"promote/cpu"}
    assert "promote/by-hand" in found
    retraining = found["retraining/retraining"]
    assert (retraining["schedules"], retraining["parameters"]) == ([], {})
    assert not retraining["global_concurrency_limit"]
    names = {a["name"] for a in place.api("automations/filter", limit=50)}
    assert not {"retrain when data have landed", "rlhf-zombies"} & names
    place.client.delete(f"deployments/{found['promote/by-hand']['id']}")
    place.cancel(gate)


def test_again_changes_nothing_and_says_so(place):
    said = place.run("make", "deploy", "DRY=1")
    assert " unchanged" in said
    assert not re.search("added|changed .*deployment|removed", said.replace("unchanged", "")), said


@pytest.mark.parametrize(
    ("path", "said"),
    [("/api", "does not answer"), ("/no-api", "what answers at|answered 404|is not Prefect")],
)
def test_no_server_is_one_line(place, path, said):
    (free,) = free_ports(1)
    own = place.environment["PREFECT_API_URL"].removesuffix("/api")
    url = f"http://127.0.0.1:{free}/api" if path == "/api" else f"{own}{path}"
    output = place.run("make", "deploy", "WAIT=0.1", check=False, PREFECT_API_URL=url)
    assert re.search(said, output), output
    assert "Traceback" not in output
    assert len(output.splitlines()) <= 3, output  # with what is waited for, and make's own line


def test_the_scheduler_has_planned_the_retraining(place):
    body = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}, "limit": 200}
    planned = [r for r in place.api("flow_runs/filter", **body) if "auto-scheduled" in r["tags"]]
    assert planned, place.server.log.read_text()[-3000:]


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
            {"overrides": {"placement": {"train-sft": "promote/cpu"}}},
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
    assert len(tree["deployments"]) == len(STAGES) + 3
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
    shown = ("Submit", "preset", "quickstart", "overrides", "Kl Coef", "Placement", "train-policy")
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
