"""The whole quickstart on a real S3 server, with the bars that its preset promises."""

import boto3
import pytest

from flows.pipeline import pipeline
from rlhf.config import load_config
from rlhf.files import read_json
from tasks.runner import store_of
from tests.report.browser import browser

__all__ = ["browser"]

pytestmark = [pytest.mark.prefect, pytest.mark.s3, pytest.mark.slow]


@pytest.fixture(scope="module")
def environment(s3_server):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=s3_server.endpoint).create_bucket(Bucket="quickstart")
        yield


@pytest.fixture(scope="module")
def config(environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    overrides = [
        "--store=s3://quickstart/rlhf",
        f"--runtime.work_dir={folder / 'work'}",
        f"--runtime.report_dir={folder / 'reports'}",
        f"--tracking.log_dir={folder / 'logs'}",
    ]
    return load_config("configs/quickstart.yaml", overrides).config


@pytest.fixture(scope="module")
def result(config):
    state = pipeline(overrides=config, return_state=True)
    assert state.is_completed(), state.message
    return state.result()


@pytest.fixture(scope="module")
def evaluations(config, result):
    store = store_of(config)
    names = ("evaluate-reward-model", "evaluate-policy")
    return [read_json(store.fetch(result.refs[n]) / "evaluation.json") for n in names]


def test_reward_model_learns_most_of_what_can_be_learnt(evaluations):
    reward_model, _ = evaluations
    assert 0.85 < reward_model["ceiling"] < 0.95
    assert reward_model["share_of_ceiling"] >= 0.60
    assert set(reward_model["by_group"]) == {"seen-template", "new-template"}
    # Not by counting words: the longer reply is no better than a coin here.
    assert 0.4 < reward_model["baseline_longer"] < 0.6


def test_policy_beats_sft_on_gold_that_nothing_was_trained_on(evaluations):
    _, policy = evaluations
    assert policy["n"] == 300
    assert policy["sampled"]["gold_strict_win_rate"] >= 0.80
    assert policy["greedy"]["gold_strict_win_rate"] >= 0.90
    assert policy["sampled"]["kl"] <= 8.0
    assert policy["sampled"]["eos_rate"] >= 0.97
    assert policy["sampled"]["repetition_after"] < 0.05
    assert policy["sampled"]["gold_after"] > policy["sampled"]["gold_before"] + 1.5


def test_nothing_but_s3_holds_the_artifacts_and_a_second_run_does_nothing(config, result, tmp_path):
    elsewhere = config.model_copy(
        update={"runtime": config.runtime.model_copy(update={"work_dir": str(tmp_path / "new")})}
    )
    again = pipeline(overrides=elsewhere, return_state=True).result()
    assert {row.state for row in again.rows} == {"Cached"}
    assert again.refs == result.refs
    assert sum(row.seconds for row in again.rows) < 60  # trained, it would be minutes


def test_report_of_a_real_run_in_a_browser(browser, result, tmp_path):
    for width in (1280, 390):
        page = browser.open(result.report, width=width)
        assert page.problems == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelectorAll('.node').length") == 10
    assert page.evaluate("document.querySelectorAll('.curve svg').length") >= 5
    assert page.screenshot(tmp_path / "report.png").stat().st_size > 20_000
