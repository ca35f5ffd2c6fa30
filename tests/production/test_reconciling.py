"""`make deploy` on a server that differs from the files, and on addresses that are no server."""

import copy
import http.server
import shutil
import threading

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from rlhf.errors import ConfigError
from tasks import deployment_files as files
from tasks.console import console
from tasks.deployments import deploy as make_deploy
from tasks.prefect_server import wait_for_server
from tests.ceph import free_ports
from tests.production.site import ROOT

pytestmark = [pytest.mark.prefect, pytest.mark.s3]

RETRAINING, PIPELINE = "retraining/retraining", "rlhf-pipeline/rlhf-pipeline"
GATE, PROMOTION = "gate-policy/gate-policy-cpu", "promote/promote-cpu"
EVALUATION = "evaluate-policy/evaluate-policy-gpu"
OF_ITS_OWN = {
    "id", "created", "updated", "last_polled", "flow_id", "version_id", "work_queue_id",
    "created_by", "updated_by", "status", "deployment_id", "active_slots", "concurrency_limit",
}  # fmt: skip


class Server:
    """The objects on a site's server, and a user's calls of its API."""

    def __init__(self, place):
        self.api = place.api
        self.client = place.client

    @property
    def deployments(self):
        found = self.api("deployments/filter", limit=50)
        flows = {flow["id"]: flow["name"] for flow in self.api("flows/filter", limit=50)}
        return {f"{flows[d['flow_id']]}/{d['name']}": d for d in found}

    @property
    def automations(self):
        return self.api("automations/filter", limit=50)

    def id(self, name):
        return self.deployments[name]["id"]

    def automation(self, name):
        return next(found for found in self.automations if found["name"] == name)

    def patch(self, path, **body):
        self.client.patch(path, json=body).raise_for_status()

    def state(self):
        """All that a file describes, without what the server adds."""
        found = {name: plain(each) for name, each in self.deployments.items()}
        automations = sorted(map(plain, self.automations), key=str)
        return found, automations


def plain(value):
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in OF_ITS_OWN}
    return sorted(map(plain, value), key=str) if isinstance(value, list) else value


@pytest.fixture
def server(place):
    return Server(place)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Function that writes a copy of the files with an edit, which then counts."""
    file, folder = tmp_path / "prefect.yaml", tmp_path / "automations"
    shutil.copytree(files.AUTOMATIONS, folder)
    before = yaml.safe_load(files.FILE.read_text())
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(files, "FILE", file)
    monkeypatch.setattr(files, "AUTOMATIONS", folder)

    def write(edit=None):
        tree = copy.deepcopy(before)
        if edit:
            edit(tree)
        file.write_text(yaml.safe_dump(tree))

    return write


@pytest.fixture
def deploy(place, write, monkeypatch, capsys):
    """Function that deploys a copy of the files with an edit, and returns what was said."""
    monkeypatch.setattr(console, "_width", 300)  # COLUMNS may have been another at its making

    def deploy(edit=None, **options):
        write(edit)
        capsys.readouterr()
        make_deploy(wait=0, **options)
        return parse(capsys.readouterr().out)

    with temporary_settings({PREFECT_API_URL: place.environment["PREFECT_API_URL"]}):
        yield deploy
        for path in (ROOT / "deployments" / "automations").iterdir():
            shutil.copy(path, files.AUTOMATIONS)
        deploy()


def parse(text):
    """Return action and reason of each object in the table, by kind and name."""
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert len({(row[1], row[2], row[3]) for row in cells}) == len(cells), text
    return {(kind, name): (action, why) for action, kind, name, why in cells}


def entry(tree, name):
    return next(each for each in tree["deployments"] if each["name"] == name)


def start(deployment):
    return {"type": "run-deployment", "source": "selected", "deployment_id": deployment}


def test_what_left_the_files_is_gone_and_nothing_else(place, server, deploy, tmp_path):
    promote, retraining = server.deployments[PROMOTION], server.id(RETRAINING)
    for name, tags in (("theirs", []), ("mine", ["rlhf"])):
        made = {"name": name, "entrypoint": "x.py:x", "tags": tags, "work_pool_name": "theirs"}
        if name == "theirs":
            server.api("work_pools/", name="theirs", type="process")
        server.api("deployments/", **made, flow_id=promote["flow_id"])
    trigger = {"type": "event", "posture": "Reactive", "expect": ["x"], "threshold": 1, "within": 0}
    by_hand = {"trigger": trigger, "actions": [start(promote["id"])]}
    for name in ("by hand", "rlhf-zombies"):
        server.api("automations/", name=name, **by_hand)
    cron = {"schedule": {"cron": "0 5 * * *"}}
    client = server.client
    for more in ({}, {"slug": "mine"}):
        client.post(f"deployments/{retraining}/schedules", json=[cron | more]).raise_for_status()
    ordered, running = (
        place.submit(GATE),
        place.submit(EVALUATION),
    )
    forced = {"state": {"type": "RUNNING"}, "force": True}
    server.api(f"flow_runs/{running}/set_state", **forced)

    def edit(tree):
        gone = ("promote", "gate_policy", "evaluate_policy")
        kept = [d for d in tree["deployments"] if not d["entrypoint"].endswith(gone)]
        tree["deployments"] = kept
        for key in ("schedules", "triggers", "concurrency_limit", "parameters"):
            del entry(tree, "retraining")[key]
        (tmp_path / "automations" / "zombies.yaml").unlink(missing_ok=True)

    before = server.state()
    planned = deploy(edit, dry=True)
    assert server.state() == before
    said = deploy(edit)
    assert said == planned
    actions = {key: action for key, (action, _) in said.items()}
    both = "rlhf-zombies"  # ours is removed, and the one by hand kept, with a line each
    assert actions.pop(("automation", both)) == "kept"
    assert actions == {
        ("deployment", PROMOTION): "removed",
        ("deployment", GATE): "kept",
        ("deployment", EVALUATION): "kept",
        ("deployment", "promote/mine"): "kept",
        ("deployment", RETRAINING): "changed",
        ("schedule", f"{RETRAINING} rlhf-weekly"): "removed",
        ("schedule", f"{RETRAINING} mine"): "kept",
        ("schedule", f"{RETRAINING} 0 5 * * *"): "kept",
        ("automation", "retrain when data have landed"): "removed",
    }
    assert "runs have ended: 1, such as" in said["deployment", EVALUATION][1]
    found = server.deployments
    assert before[0].keys() - found.keys() == {PROMOTION}
    assert [s["slug"] for s in found[RETRAINING]["schedules"]] in (["mine", None], [None, "mine"])
    assert (found[RETRAINING]["parameters"], found[RETRAINING]["concurrency_options"]) == ({}, None)
    assert not found[RETRAINING]["global_concurrency_limit"]
    names = sorted(found["name"] for found in server.automations)
    assert names == ["by hand", "rlhf-zombies", "start lost runs again"]
    assert server.api("work_pools/theirs")["name"] == "theirs"
    # The runs were left alone; when they have ended, their deployments go.
    for run in (ordered, running):
        assert server.api(f"flow_runs/{run}")["state"]["type"] in ("SCHEDULED", "RUNNING")
        forced = {"state": {"type": "CANCELLED"}, "force": True}
        server.api(f"flow_runs/{run}/set_state", **forced)
    assert deploy(edit)["deployment", GATE] == (
        "removed",
        "not in the files",
    )
    assert server.api(f"flow_runs/{running}")["state"]["type"] == "CANCELLED"
    assert {GATE, EVALUATION}.isdisjoint(server.deployments)
    for name in ("theirs", "mine"):
        client.delete(f"deployments/{server.id(f'promote/{name}')}")
    client.delete("work_pools/theirs")
    for found in server.automations:
        if not found["tags"]:
            client.delete(f"automations/{found['id']}")
    for schedule in server.deployments[RETRAINING]["schedules"]:
        client.delete(f"deployments/{retraining}/schedules/{schedule['id']}")


def test_everything_that_was_changed_by_hand_is_as_in_the_files(server, deploy):
    before = server.state()
    pipeline, retraining = server.id(PIPELINE), server.deployments[RETRAINING]
    changed = {
        "description": "other", "parameters": {"preset": "lora"}, "version": "0", "pull_steps": [],
        "entrypoint": "x.py:x", "tags": ["rlhf", "more"], "concurrency_limit": 7,
        "concurrency_options": {"collision_strategy": "CANCEL_NEW"}, "job_variables": {},
        "enforce_parameter_schema": False, "parameter_openapi_schema": {"type": "object"},
    }  # fmt: skip
    server.patch(f"deployments/{pipeline}", **changed)
    server.patch(f"deployments/{server.id(PROMOTION)}", work_pool_name="gpu")
    (schedule,) = retraining["schedules"]
    path = f"deployments/{retraining['id']}/schedules/{schedule['id']}"
    server.patch(path, schedule={"cron": "1 1 * * *"}, parameters={"preset": "lora"})
    zombies = server.automation("rlhf-zombies")
    zombies["trigger"]["within"] = 240
    trigger = server.automation("retrain when data have landed")
    trigger["trigger"]["expect"] = ["other"]
    for each in (zombies, trigger):
        path = f"automations/{each['id']}"
        for key in ("id", "created", "updated"):
            del each[key]
        server.client.put(path, json=each).raise_for_status()
    server.api("automations/", **trigger)  # as by two deployments at once
    said = deploy()
    action, why = said.pop(("deployment", PIPELINE))
    assert action == "changed"
    assert sorted(why.split(", ")) == sorted(changed)
    twins = said.pop(("automation", trigger["name"]))
    assert twins in [("removed", "there twice"), ("changed", "trigger")]
    assert said == {
        ("deployment", PROMOTION): ("changed", "work_pool_name"),
        ("schedule", f"{RETRAINING} rlhf-weekly"): ("changed", "parameters, schedule"),
        ("automation", "rlhf-zombies"): ("changed", "trigger"),
    }
    assert server.state() == before
    assert deploy() == {}


def test_what_an_older_version_deployed_is_taken_over(place, server, deploy):
    before = server.state()
    for name, found in server.deployments.items():
        tags = [tag for tag in found["tags"] if tag != files.MARK]
        server.patch(f"deployments/{found['id']}", tags=tags)
        for schedule in found["schedules"]:
            path = f"deployments/{found['id']}/schedules"
            server.client.delete(f"{path}/{schedule['id']}").raise_for_status()
            slug = {"slug": "weekly"} if name == RETRAINING else {}
            old = {"schedule": schedule["schedule"], **slug}
            server.client.post(path, json=[old]).raise_for_status()
    for found in server.automations:
        server.client.delete(f"automations/{found['id']}").raise_for_status()
        old = {key: found[key] for key in ("name", "description", "trigger", "actions")}
        target = found["actions"][0].get("deployment_id")
        owner = {"owner_resource": f"prefect.deployment.{target}"} if target else {}
        server.api("automations/", **old, **owner)
    said = deploy()
    assert {action for action, _ in said.values()} == {"changed"}
    assert said["schedule", f"{RETRAINING} rlhf-weekly"] == ("changed", "slug")
    assert said["automation", "start lost runs again"] == ("changed", "tags")
    assert server.state() == before


def test_what_an_operator_paused_stays_paused(server, deploy):
    before = server.state()
    retraining, name = server.deployments[RETRAINING], "retrain when data have landed"
    schedule = f"deployments/{retraining['id']}/schedules/{retraining['schedules'][0]['id']}"
    places = {
        f"deployments/{server.id(PROMOTION)}": "paused",
        schedule: "active",
        f"automations/{server.automation(name)['id']}": "enabled",
    }
    for path, field in places.items():
        server.patch(path, **{field: field == "paused"})
    paused = server.state()
    said = deploy()
    assert server.state() == paused
    assert {action for action, _ in said.values()} == {"kept"}
    assert len(said) == len(places)
    for path, field in places.items():
        server.patch(path, **{field: field != "paused"})
    assert server.state() == before


def test_no_run_has_a_parameter_that_its_flow_has_not(server, deploy):
    """Its process would end at once, and be started again as if it were lost."""
    for name, found in server.deployments.items():
        path = f"deployments/{found['id']}/create_flow_run"
        needed = {"leader": "host:1", "node": 1} if name.startswith("node/") else {}
        answer = server.client.post(path, json={"parameters": {"nonsense": 1, **needed}})
        assert answer.status_code == 409
        assert "nonsense" in answer.text


def test_a_deployment_of_another_project_is_not_written_over(server, deploy):
    path = f"deployments/{server.id(PROMOTION)}"
    pipeline = f"deployments/{server.id(PIPELINE)}"
    server.patch(path, tags=["theirs"])
    server.patch(pipeline, version="0")
    with pytest.raises(ConfigError, match=f"a deployment {PROMOTION} that this project did not"):
        deploy()
    assert server.api(pipeline)["version"] == "0", "something was changed before"
    server.patch(path, tags=["rlhf", "stage"])


def lacking_mark(one):
    one["tags"] = ["rlhf"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lacking_mark, "retraining: tags: .* lack 'made-by:rlhf-deploy'"),
        (lambda one: one["schedules"][0].update(slug="weekly"), "'weekly' is not the slug"),
        (lambda one: one["schedules"][0].pop("slug"), "begins with 'rlhf-'"),
        (lambda one: one["schedules"][0].update(cron="x"), "schedule"),
        (lambda one: one["schedules"].append(one["schedules"][0]), "two have the same slug"),
        (lambda one: one["triggers"][0].pop("name"), "has no name"),
        (lambda one: one["triggers"].append(one["triggers"][0]), "names two|same name"),
        (lambda one: one.update(sla=1), "'sla' is none of"),
        (lambda one: one.update(entrypoint="flows/none.py:x"), "retraining: .*none.py"),
        (lambda one: one.update(entrypoint="flows/retraining.py:none"), "retraining: .*none"),
        (lambda one: one.update(concurrency_limit={"limit": "x"}), "limit"),
        (lambda one: one.pop("work_pool"), "work_pool"),
    ],
)
def test_files_that_could_not_be_reconciled_are_refused_in_one_line(write, edit, said):
    def alone(tree):
        tree["deployments"] = [entry(tree, "retraining")]
        edit(tree["deployments"][0])

    write(alone)
    with pytest.raises(ConfigError, match=f"^prefect.yaml: .*{said}") as caught:
        files.read_files()
    assert "\n" not in str(caught.value)


@pytest.fixture
def answers():
    """Function that starts a server whose answers to GETs are these, the last one for ever."""
    started = []

    def start(*answers):
        waiting = list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                status, body = waiting.pop(0) if len(waiting) > 1 else waiting[0]
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        started.append(made)
        return temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{made.server_port}/api"})

    yield start
    for made in started:
        made.shutdown()
        made.server_close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, b"<html>"), "is not Prefect's server; set PREFECT_API_URL"),
        ((200, b'{"status": "ok"}'), "is not Prefect's server; set PREFECT_API_URL"),
        ((404, b"no"), "answered 404 .* It ends in /api"),
        ((401, b"no"), "answered 401 .*PREFECT_API_AUTH_STRING"),
        ((503, b"starting"), r"answered 503 .* \(waited 0 s\)"),
    ],
)
def test_what_is_no_server_is_said_in_one_line(answers, answer, said):
    with answers(answer), pytest.raises(ConfigError, match=said) as caught:
        wait_for_server("make deploy", 0)
    assert "\n" not in str(caught.value)


def test_a_server_that_starts_is_waited_for(answers, capsys):
    with answers((503, b"starting"), (502, b""), (200, b"true")):
        wait_for_server("make deploy", 600)
    assert capsys.readouterr().out.count("waiting up to 600 s") == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:{free}/api"])
def test_no_server_is_one_line(url):
    (free,) = free_ports(1)
    address = temporary_settings({PREFECT_API_URL: url.format(free=free)})
    with address, pytest.raises(ConfigError, match="PREFECT_API_URL") as caught:
        wait_for_server("make deploy", 0)
    assert "\n" not in str(caught.value)
