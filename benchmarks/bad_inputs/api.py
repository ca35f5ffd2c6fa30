"""Bad inputs through the API of a real Prefect server with workers."""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.bad_inputs.cases import WIDTH, Case, Outcome
from tests.flows.conftest import tiny_tree
from tests.production.site import Site, site

#: Seconds in which a bad run has to end.
PATIENCE = 180.0
#: States in which a bad run may end.
ENDED = ("FAILED", "CANCELLED")
PIPELINE, STAGE, RETRAINING, RESTARTS = (
    "rlhf-pipeline", "train-sft", "retraining", "restart-lost-runs"
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A run that is asked for.

    Args:
        kind: What is bad.
        deployment: Name of the deployment's flow.
        body: Of the request, as JSON or as bytes that are none.
        refused: Whether the server has to refuse it.
        deployed: Changes of the deployment before the request.
    """

    kind: str
    deployment: str
    body: Mapping[str, Any] | bytes
    refused: bool | None = None
    deployed: Mapping[str, Any] = field(default_factory=dict[str, Any])


def requests() -> Iterator[Request]:
    """Yield all bad requests for runs."""
    yield from _bad_requests()
    yield from _bad_overrides()
    for deployment in (PIPELINE, STAGE, RETRAINING):
        for parameters in (
            {"preset": None}, {"preset": 17}, {"preset": "nothing"}, {"preset": "../../etc/passwd"},
            {"preset": "[/x]"}, {"preset": "x" * 100_000}, {"overrides": None}, {"overrides": 17},
            {"overrides": "ppo"}, {"overrides": []},         ):  # fmt: skip
            yield Request("parameters", deployment, {"parameters": parameters}, True)
        # Prefect's schema of a flow's parameters allows more of them; the run refuses those.
        for parameters in ({"nonsense": 1}, {"config": "a.yaml"}):
            yield Request("parameters", deployment, {"parameters": parameters})
    for inputs in (None, 17, [], {"sft": 17}, {"sft": None}, {"sft": {"a": 1}}):
        yield Request("inputs of a stage", STAGE, {"parameters": {"inputs": inputs}}, True)
    for inputs in (
        {"sft": ""}, {"sft": "zz"}, {"nonsense": "0" * 64}, {"data": "../../x"}, {"data": "[/x]"},
        {"data": "f" * 64}, {"data": "s3://b/x"}, {"": "0" * 64},
    ):  # fmt: skip
        parameters = {"inputs": inputs, "overrides": {"store": "<store>"}}
        yield Request("inputs of a stage", STAGE, {"parameters": parameters})
    for parameters in (
        {"limit": -1}, {"limit": 10**30}, {"limit": "x"}, {"limit": None}, {"limit": 1.5},
        {"pending_seconds": 0}, {"pending_seconds": -1}, {"pending_seconds": 1e300},
        {"pending_seconds": "soon"},
    ):  # fmt: skip
        yield Request("parameters", RESTARTS, {"parameters": parameters}, True)


def _bad_overrides() -> Iterator[Request]:
    deep: Any = 1
    for _ in range(200):
        deep = {"a": deep}
    for tree in (
        {"seed": "x"}, {"seed": -1}, {"seed": 2**31}, {"seed": 10**30}, {"seed": 1.5},
        {"seed": True}, {"seed": None}, {"ppo": {"total_episodes": 10**30}},
        {"ppo": {"kl_coef": -1}},
        {"ppo": {"kl_coef": "nan"}}, {"ppo": {"kl_coef": 1e300}}, {"ppo": {"nonsense": 1}},
        {"ppo": []}, {"ppo": "x"}, {"nonsense": 1}, {"name": ""}, {"name": "[/x]"},
        {"name": "a b"}, {"name": "x" * 64}, {"name": "\u202ex"}, {"name": None}, {"store": ""},
        {"store": None}, {"placement": {"nonsense": "x"}}, {"placement": {"train-sft": ""}},
        {"gates": {"policy": [{"metric": "", "min": "x"}]}}, {"data": {"source": 17}}, deep,
        {"ppo": {"lora": deep}}, {"rl_nonsense": 1}, {"runtime": {"threads": 10**30}},
        {"retries": {"attempts": 10**6}}, {"promotion": "sometimes"},
    ):  # fmt: skip
        # The server takes null for a field that is not given; the run refuses it.
        refused = None if None in tree.values() else True
        yield Request("overrides", PIPELINE, {"parameters": {"overrides": tree}}, refused)
    for tree in (
        {"store": "s3://"}, {"store": "http://x"}, {"store": "file://x"}, {"store": "/dev/null/x"},
        {"store": "s3://nothing-there-at-all/x"}, {"store": "/proc/x"}, {"store": "x?y#z"},
        {"data": {"source": "/nothing"}}, {"data": {"source": "s3://"}},
        {"data": {"source": "/dev/zero"}}, {"data": {"source": "x" * 5_000}},
        {"base": {"path": "/nothing"}}, {"base": {"path": "[/x]"}},
        {"base": {"path": "artifact:zz"}},
        {"ppo": {"reward_model_path": "/nothing"}}, {"ppo": {"env_config": "{a: ["}},
        {"ppo": {"env_config": "[" * 3_000}}, {"ppo": {"rl_gamma": 0.5, "gamma": 0.6}},
        {"placement": {"train-sft": "nothing"}}, {"sft": {"lora": {"target_modules": "(" * 500}}},
        {"gates": {"policy": [{"metric": "nonsense", "min": 1}]}}, {"sft": {"max_length": 1}},
        {"ppo": {"env_type": "custom:os.system"}}, {"evaluation": {"judge": "nonsense"}},
        {"runtime": {"device": "nonsense"}}, {"retries": {"attempts": 51}},
    ):  # fmt: skip
        whole = {"store": "<store>", **tree}
        yield Request("overrides", PIPELINE, {"parameters": {"overrides": whole}})
    for tree in ({"store": "/dev/null/x"}, {"data": {"source": "/nothing"}},
                 {"base": {"path": "/nothing"}}):  # fmt: skip
        for deployment in (STAGE, RETRAINING):
            whole = {"store": "<store>", **tree}
            yield Request("overrides", deployment, {"parameters": {"overrides": whole}})
    for text in ("a\0b", "\x1b[31m", "\ud800", "\uffff", "x" * 600_000):
        raw = json.dumps({"parameters": {"overrides": {"data": {"source": text}}}}).encode()
        yield Request("characters", PIPELINE, raw)
        raw = json.dumps({"parameters": {"overrides": {text[:300]: 1}}}).encode()
        yield Request("characters", PIPELINE, raw, True)


def _bad_requests() -> Iterator[Request]:
    for raw in (b"null", b"[]", b"17", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000,
                b'{"parameters": ' * 1_000 + b"1" + b"}" * 1_000, b'{"parameters": NaN}',
                b'{"parameters": {"overrides": {"seed": ' + b"9" * 5_000 + b"}}}"):  # fmt: skip
        yield Request("requests", PIPELINE, raw, True)
    bad = {"parameters": {"overrides": {"store": "/dev/null/x"}}}
    for more in (
        {"job_variables": {"env": "x"}}, {"job_variables": {"env": {"A": 17}}},
        {"job_variables": {"command": ""}}, {"job_variables": {"command": "nonsense-command"}},
        {"job_variables": {"working_dir": "/nothing"}}, {"job_variables": {"nonsense": 1}},
        {"job_variables": {"stream_output": "x"}}, {"job_variables": 17},
        {"job_variables": {"env": {"RLHF_THREADS": "x"}}},
        {"job_variables": {"env": {"PREFECT_API_URL": "http://127.0.0.1:1/api"}}},
    ):  # fmt: skip
        yield Request("job variables", PIPELINE, {**bad, **more})
    for more in (
        {"name": "[/x]"}, {"name": ""}, {"name": "x" * 10_000}, {"name": "\x1b[31m\r"},
        {"name": 17},
        {"tags": ["[/x]"]}, {"tags": "x"}, {"tags": [17]}, {"tags": ["work:x"]}, {"tags": [""]},
        {"tags": ["restart-of:nonsense"]}, {"tags": ["restart-of:" + "0" * 5_000]},
        {"tags": ["restarted"]}, {"idempotency_key": "x" * 10_000}, {"work_queue_name": "nothing"},
        {"parent_task_run_id": "01234567-89ab-cdef-0123-456789abcdef"},
        {"parent_task_run_id": "x"}, {"state": {"type": "NONSENSE"}}, {"state": 17},
        {"state": {"type": "SCHEDULED", "name": "[/x]", "message": "x" * 10_000}},
        {"labels": {"a": {"b": 1}}}, {"empirical_policy": {"retries": -1}},
    ):  # fmt: skip
        yield Request("names and tags", PIPELINE, {**bad, **more})
    for parameters in (
        {"overrides": 17}, {"preset": 17}, {"nonsense": [[1]]}, {"overrides": {"seed": "x"}},
        {"overrides": {"ppo": {"kl_coef": [1]}}},
    ):  # fmt: skip
        for deployment in (PIPELINE, STAGE, RETRAINING):
            changed = {"parameters": parameters, "enforce_parameter_schema": False}
            yield Request("edited deployments", deployment, {}, None, changed)
    for changed in (
        {"entrypoint": "nothing.py:nothing"}, {"entrypoint": "flows/pipeline.py:nothing"},
        {"path": "/nothing"}, {"entrypoint": ""},
    ):  # fmt: skip
        yield Request("edited deployments", PIPELINE, bad, None, changed)
    for parameters in ({"limit": "x"}, {"limit": 10**6}, {"pending_seconds": -1}):
        changed = {"parameters": parameters, "enforce_parameter_schema": False}
        yield Request("edited deployments", RESTARTS, {}, None, changed)


#: Answers to the question for an approval that are none.
ANSWERS: tuple[Any, ...] = (
    None, {}, 17, [], "approve", {"decision": "maybe", "by": "ann"}, {"decision": "approve"},
    {"decision": "approve", "by": ""}, {"decision": "approve", "by": " "},
    {"decision": "approve", "by": "\u200b"}, {"decision": "approve", "by": "x" * 3_000},
    {"decision": "approve", "by": 17}, {"decision": "approve", "by": "ann", "why": "x" * 3_000},
    {"decision": "approve", "by": "ann", "why": None}, {"decision": ["approve"], "by": "ann"},
    {"decision": True, "by": "ann"}, {"decision": "APPROVE", "by": "ann"},
    {"decision": "approve\0", "by": "ann"}, {"decision": "approve", "by": {"a": 1}},
)  # fmt: skip


class Trials:
    """Bad requests to a site, and what came of them."""

    def __init__(self, place: Site, folder: Path) -> None:
        self.place, self.folder = place, folder
        self.store = str(folder / "store")
        flows = ["rlhf-pipeline", "retraining", "restart-lost-runs", "train-sft"]
        self.deployed = {
            d["name"] if d["name"] in flows else "train-sft": d
            for d in place.api("deployments/filter", limit=100)
            if d["name"] in flows or d["entrypoint"].endswith("train_sft")
        }

    def one(self, request: Request) -> tuple[Case, Outcome]:
        """Ask for a run, and wait for its end."""
        deployment = self.deployed[request.deployment]
        path = f"deployments/{deployment['id']}"
        body = request.body
        if not isinstance(body, bytes):
            body = json.dumps(body).replace("<store>", self.store).encode()
        shown = body[:140].decode(errors="replace")
        shown = f"{request.deployment} {shown} {json.dumps(request.deployed)[:90]}"
        case = Case(f"API: {request.kind}", (shown,), refused=True)
        started = time.monotonic()
        if request.deployed:
            answer = self.place.client.patch(path, json=dict(request.deployed))
            if answer.status_code >= 400:
                return case, self._refusal(answer, started)
        try:
            answer = self._post(f"{path}/create_flow_run", body)
            if answer.status_code >= 400:
                outcome = self._refusal(answer, started)
            elif request.refused:
                outcome = Outcome(0, errors="error: the server takes it", output="x")
                self.place.cancel(answer.json()["id"])
            else:
                outcome = self._checked(self._end(answer.json()["id"], started))
        finally:
            if request.deployed:
                restored = {
                    name: deployment[name]
                    for name in ("parameters", "enforce_parameter_schema", "entrypoint", "path")
                }
                self.place.client.patch(path, json=restored).raise_for_status()
        return case, outcome

    def _post(self, path: str, body: bytes) -> httpx.Response:
        """Send a body as it is; again, if the server has closed the connection after an error."""
        kind = {"Content-Type": "application/json"}
        try:
            return self.place.client.post(path, content=body, headers=kind)
        except httpx.TransportError:
            return self.place.client.post(path, content=body, headers=kind)

    def _refusal(self, answer: httpx.Response, started: float) -> Outcome:
        said = f"error: {answer.status_code} {' '.join(answer.text.split())}"[:1_500]
        code = 2 if answer.status_code < 500 else 99
        return Outcome(code, errors=said, seconds=min(time.monotonic() - started, 19))

    def _end(self, run: str, started: float) -> Outcome:
        """Wait for the end of a run, and judge its state and its message."""
        while True:
            found = self.place.api(f"flow_runs/{run}")
            state = found["state"]
            if state["type"] in (*ENDED, "COMPLETED", "CRASHED"):
                break
            if time.monotonic() - started > PATIENCE:
                self.place.cancel(run)
                return Outcome(None, errors=f"{state['name']}: {state['message']}")
            time.sleep(0.3)
        message = str(state["message"] or "")
        codes = {"COMPLETED": 0, "CRASHED": 98}
        said = "error: " + (message if len(message) < WIDTH else message[: WIDTH + 1])
        if not message:
            said = ""
        shown = said.replace("\n", "\nerror: ")  # more than one line is wrong
        tasks = self.place.api("task_runs/filter", flow_runs={"id": {"any_": [run]}})
        for task in tasks:
            text = str(task["state"]["message"] or "")
            if task["state"]["type"] == "FAILED" and ("Traceback" in text or "\n" in text):
                shown += f"\nerror: task: {text[:300]}"
        return Outcome(codes.get(state["type"], 1), errors=shown, output=state["name"])

    def _checked(self, outcome: Outcome) -> Outcome:
        """Return the outcome, or what no longer works on this server."""
        asked = {"limit": 200, "sort": "EXPECTED_START_TIME_DESC"}
        for path in ("flow_runs/filter", "deployments/filter"):
            answer = self.place.client.post(path, json=asked if "runs" in path else {})
            if answer.status_code != 200:
                return Outcome(99, errors=f"error: {path} answers {answer.status_code}")
        code, said = command(self.place, "runs", "--limit", "50")
        if code or "Traceback" in said:
            return Outcome(99, errors=f"error: rlhf runs: {said[-300:]}")
        return outcome

    def approvals(self) -> Iterator[tuple[Case, Outcome]]:
        """Answer a question wrongly in all ways, and then rightly."""
        tree = tiny_tree(self.folder)
        tree |= {"promotion": {"name": "tiny", "approval": "manual"}, "store": self.store}
        del tree["runtime"]
        run = self.place.submit(PIPELINE, overrides=tree)
        for text in ("17", '{"run_input": {"decision": "approve", "by": "ann"}}', "{}"):
            answer = self.place.client.post(f"flow_runs/{run}/resume", content=text)
            yield self._answered(f"before the question {text}", answer)
        waiting = self.place.wait(run, "Suspended", "Failed", "Crashed", seconds=600)
        assert waiting["state"]["name"] == "Suspended", waiting["state"]
        for value in ANSWERS:
            answer = self.place.client.post(f"flow_runs/{run}/resume", json={"run_input": value})
            shown = json.dumps(value)[:100]
            case, outcome = self._answered(shown, answer)
            now = self.place.api(f"flow_runs/{run}")["state"]["name"]
            if now != "Suspended":
                outcome = Outcome(99, errors=f"error: {now} after this answer")
            yield case, outcome
        for words in (("approve", run[:8], "--by", " "), ("approve", run[:8], "--why", "x" * 3_000),
                      ("approve", run[:8], "--by", "\u200b"), ("approve", "nothing"),
                      ("approve", ""), ("approve", run[:8], "--store", self.store),
                      ("status", "nothing"), ("status", "")):  # fmt: skip
            code, said = command(self.place, *words)
            yield Case("API: approvals", words, refused=True), Outcome(code, errors=said)
        right = {"run_input": {"decision": "refuse", "by": "ann", "why": "[/x] *no*"}}
        for n in range(2):
            answer = self.place.client.post(f"flow_runs/{run}/resume", json=right)
            if n:
                yield self._answered("a second time", answer)
        ended = self.place.wait(run)["state"]
        case = Case("API: approvals", ("refused in the end",), refused=True)
        yield case, Outcome(1, errors=f"error: {ended['message']}", output=ended["name"])
        answer = self.place.client.post(f"flow_runs/{run}/resume", json=right)
        yield self._answered("after the end", answer)
        gone = "01234567-89ab-cdef-0123-456789abcdef"
        for name in (gone, "x"):
            answer = self._post(f"flow_runs/{name}/resume", json.dumps(right).encode())
            yield self._answered(f"of no run: {name}", answer)

    def _answered(self, shown: str, answer: httpx.Response) -> tuple[Case, Outcome]:
        case = Case("API: approvals", (shown,), refused=True)
        status = answer.json().get("status") if answer.status_code < 300 else None
        text = f"error: {answer.status_code} {answer.text[:300]}"
        code = 99 if answer.status_code >= 500 else 0 if status == "ACCEPT" else 2
        return case, Outcome(code, errors=text)


def command(place: Site, *words: str) -> tuple[int, str]:
    """Run a command of `rlhf` in this process against the site's server."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import cli

    out, argv = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), sys.argv
    sys.argv, code = ["rlhf", *words], 0
    try:
        with (
            temporary_settings({PREFECT_API_URL: place.environment["PREFECT_API_URL"]}),
            contextlib.redirect_stderr(out), contextlib.redirect_stdout(io.TextIOWrapper(
                io.BytesIO(), encoding="utf-8")),
        ):  # fmt: skip
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.argv = argv
    out.flush()
    return code, out.buffer.getvalue().decode()  # pyright: ignore[reportAttributeAccessIssue]


def outcomes(
    folder: Path, chance: random.Random, most: int = 1000, kinds: Sequence[str] = ()
) -> Iterator[tuple[Case, Outcome]]:
    """Start a site, and yield what came of bad requests to it: all that it has to refuse, and at
    most so many of the others, which a worker may have to run. `kinds` are those to try, if not
    all; `approvals` is one too."""
    asked = [each for each in requests() if not kinds or each.kind in kinds]
    others = [n for n, each in enumerate(asked) if not each.refused]
    left_out = {*others} - {*chance.sample(others, min(most, len(others)))}
    folder.mkdir()
    with site(folder, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "1"}) as place:
        place.run("make", "deploy")
        for pool in ("cpu", "gpu"):
            place.worker(pool)
        trials = Trials(place, folder)
        if not kinds or "approvals" in kinds:
            yield from trials.approvals()
        for n, request in enumerate(asked):
            if n not in left_out:
                yield trials.one(request)
