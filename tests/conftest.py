"""Set-up of all tests: environment, shape checks, coverage, order and groups."""

import gc
import os
import sys
from pathlib import Path

# Before anything imports torch or Prefect.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "600")
os.environ.setdefault("PREFECT_SERVER_DATABASE_TIMEOUT", "60")
os.environ.setdefault("PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT", "60")
os.environ.setdefault("PREFECT_CLIENT_RETRY_EXTRA_CODES", "500")

import hypothesis
import pytest

from tests import cpu_times, line_coverage, reaper
from tests.ceph import s3_server
from tests.examples import examples
from tests.startup import sitecustomize
from tests.swift import s3_weak_server

# Before any test imports rlhf. RLHF_CHECK_SHAPES=0 for the whole quickstart, which runs at a user's
# speed, and for a bare GPU machine, which has no beartype.
CHECKS_SHAPES = os.environ.get("RLHF_CHECK_SHAPES", "1") == "1"
if CHECKS_SHAPES:
    from tests.library import typecheck

    typecheck.install()

WANTED = os.environ.get("RLHF_LINE_COVERAGE")
LINE_COVERAGE = line_coverage.LineCoverage(float(WANTED)) if WANTED else None

__all__ = ["s3_server", "s3_weak_server"]

# An example may take as long as a busy machine needs.
hypothesis.settings.register_profile(
    "any-speed",
    deadline=None,
    max_examples=examples(100),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("any-speed")


def pytest_addoption(parser):
    cpu_times.add_option(parser)


def pytest_configure(config):
    if config.getoption("cpu_times"):
        config.pluginmanager.register(cpu_times.CpuTimes())
    if LINE_COVERAGE:
        config.pluginmanager.register(LINE_COVERAGE)
    # So that all Python processes of the session import sitecustomize, as this one has.
    paths = [str(Path(sitecustomize.__file__).parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if not hasattr(config, "workerinput"):  # a worker of xdist belongs to the session
        reaper.start()
    # transformers renamed a switch that TRL and peft still read by its old name.
    for name in ("gradient_checkpointing", "is_gradient_checkpointing"):
        config.addinivalue_line(
            "filterwarnings", f"ignore:`{name}` is deprecated:FutureWarning:transformers"
        )


def pytest_ignore_collect(collection_path, config):
    """With `-m device`, import no other modules, whose packages a GPU machine may lack."""
    if not config.option.markexpr.startswith("device") or collection_path.suffix != ".py":
        return None
    # pytest calls this for conftest.py too.
    is_test = collection_path.name.startswith("test_")
    return (is_test and "pytest.mark.device" not in collection_path.read_text("utf-8")) or None


def pytest_collection_finish():
    """Leave all that is imported out of garbage collections, which each training asks for."""
    _leave_imported()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Leave out what a test imported first, too, as the trainers of transformers."""
    if len(sys.modules) > IMPORTED[-1] + 200:
        _leave_imported()


#: Modules that were imported when collections last got to leave them out.
IMPORTED = [0]


def _leave_imported() -> None:
    gc.collect()
    gc.freeze()
    IMPORTED.append(len(sys.modules))


#: Whole programs, the emulated device, training again and again, and long matrices, which
#: `make whole` runs.
WHOLE = (
    "tests/flows/", "tests/production/", "tests/benchmarks/", "tests/serving/", "tests/test_reaper",
    "tests/test_emulated_cuda", "tests/test_line_coverage",
    *(
        f"tests/library/test_{name}"
        for name in (
            "checkpoint_upload", "environments_training", "external_models", "families",
            "generate_batches", "on_a_device", "ppo_options", "ppo_resume", "processes",
            "promotion", "resume_stage", "shared_base", "smoke", "uploads",
            # Of files whose other tests are of single functions.
            "frozen.py::test_a_run_on", "frozen.py::test_adapters", "frozen.py::test_ppo_by",
            "imports.py::test_every", "imports.py::test_packages", "judge.py::test_the_negatives",
            "nodes.py::test_two_machines", "ppo_budget.py::test_two_processes",
            "precision.py::test_storing", "ready_reward_model.py::test_preflight",
            "rehearsal.py::test_a_run_rehearses", "rehearsal.py::test_it_rehearses",
            "rehearsal.py::test_the_command_rehearses", "reward_models.py::test_an_encoder_learns",
            "reward_stage.py::test_negatives_train",
            "training_resume.py::test_a_damaged", "training_resume.py::test_a_kill",
            "training_resume.py::test_a_run_resumed_after_any_step_is_the_same_run[reward",
            "training_resume.py::test_another", "training_resume.py::test_whatever",
            "watchdog.py::test_a_healthy", "watchdog.py::test_a_resumed",
            "watchdog.py::test_everything", "watchdog.py::test_kills",
            "watchdog.py::test_not_finite_with_",
            "watchdog.py::test_the_others", "watchdog.py::test_two", "watchdog.py::test_without",
        )
    ),
    *(f"tests/store/test_{name}" for name in ("flips", "kills", "races", "wire_faults")),
    # A second for each of many cases, or many seconds for one.
    "tests/config/test_limits.py::test_hostile",
    "tests/data/test_meaning.py::test_more_late", "tests/data/test_strays.py::test_a_single_chat",
    "tests/data/test_template_cost.py::test_a_costly",
    "tests/report/test_charts.py::test_a_card", "tests/report/test_findings.py::test_no_odd",
    "tests/report/test_render.py::test_each_part", "tests/test_world.py::test_no_other",
)  # fmt: skip
#: Of these, the tests that `make test` runs all the same: of each kind one, by the start of its id.
EACH_COMMIT = (
    "tests/benchmarks/test_families", "tests/benchmarks/test_gates", "tests/test_emulated_cuda",
    # One server of Prefect, one tiny run, and what is read from it; commands in this process.
    *(
        f"tests/flows/test_{name}"
        for name in (
            "command_line.py::test_bad_input_is_one_line", "command_line.py::test_config_show",
            "command_line.py::test_flags", "data_command", "metrics.py::test_tensorboard",
            "own_data.py::test_a_gate", "pipeline.py::test_a_deleted", "pipeline.py::test_a_lost",
            "pipeline.py::test_a_loaded", "pipeline.py::test_a_rejection_is_not",
            "pipeline.py::test_runs_to", "pipeline.py::test_samples", "pipeline.py::test_stages",
            "pipeline.py::test_the_first_screen", "progress", "security.py::test_a_run_can",
            "security.py::test_an_environment",
        )
    ),
    *(
        f"tests/library/test_{name}"
        for name in (
            "checkpoint_upload.py::test_a_damaged_one_is_named_passed_over_and_mended[folder-gone",
            "checkpoint_upload.py::test_only_what",
            "environments_training.py::test_every_reply", "environments_training.py::test_multi",
            "external_models.py::test_a_base", "external_models.py::test_a_good",
            "external_models.py::test_places", "families.py::test_a_model_that",
            "frozen.py::test_adapters_on_a_base_in_16_bits_learn_the_same[sft",
            "frozen.py::test_ppo_by_qlora_on_a_shared_base_learns[adapter-fp32",
            "generate_batches.py::test_stop", "generate_batches.py::test_what",
            "on_a_device.py::test_sums", "on_a_device.py::test_the_decode_loop",
            "ppo_options.py::test_advantages", "ppo_options.py::test_compat",
            "ppo_options.py::test_gradients", "ppo_options.py::test_schedules",
            "ppo_options.py::test_target_kl", "ppo_options.py::test_the_policys",
            "ppo_options.py::test_the_score", "ppo_options.py::test_while",
            "ppo_resume.py::test_a_resumed_run_is_the_same_run[2]",
            "ppo_resume.py::test_everything",
            "precision.py::test_storing_frozen_layers_lowered_changes_no_bit_of_a_run[options0",
            "processes.py::test_a_job",
            "processes.py::test_shares", "processes.py::test_what_can", "processes.py::test_where",
            "promotion.py::test_settings", "promotion.py::test_who",
            "rehearsal.py::test_it_rehearses_what_is_configured[full",
            "resume_stage.py::test_a_training",
            "reward_models.py::test_an_encoder_learns_a_preference[lora-bert",
            "shared_base.py::test_each",
            "shared_base.py::test_one_base", "shared_base.py::test_scores",
            "shared_base.py::test_what", "smoke.py::test_without",
            "training_resume.py::test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken[sft",
            "training_resume.py::test_another_identity_is_refused_by_name[sft",
            "training_resume.py::test_whatever_has_a_state_is_resumed[sft-dropout",
            "uploads.py::test_after", "uploads.py::test_sigterm", "uploads.py::test_who",
            "watchdog.py::test_a_resumed_run_is_the_same_run[weights-2",
            "watchdog.py::test_the_others[kl_above",
        )
    ),
    *(
        f"tests/data/test_strays.py::test_a_single_chat_leaves_its_row_out_wherever_it_stands[{form}]"
        for form in ("Alpaca", "bytes", "ChatML", "JSON")
    ),
    *(
        f"tests/data/test_template_cost.py::test_a_costly_template_is_refused_within_its_limits[{cost}]"
        for cost in ("loops", "doubled", "escaped again")
    ),
    "tests/report/test_charts.py::test_a_card", "tests/report/test_findings.py::test_no_odd",
    "tests/report/test_render.py::test_each_part_may_be_missing_or_broken[nan",
    *(
        f"tests/store/test_{name}"
        for name in (
            "flips.py::test_flip_in_a_date", "flips.py::test_flip_in_every_download",
            "kills.py::test_killed_readers", "races.py::test_one_writer", "races.py::test_publish",
            "wire_faults.py::test_broken_once", "wire_faults.py::test_refused_for_a_second",
        )
    ),
)  # fmt: skip
#: Of these, the tests that check shapes all the same: batches of replies, PPO with each option.
CHECKED = tuple(
    f"tests/library/test_{name}" for name in ("generate_batches", "ppo_options", "shared_base")
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Check shapes only in tests of single functions."""
    if CHECKS_SHAPES:
        single = not item.nodeid.startswith(WHOLE)
        typecheck.enable(single or item.nodeid.startswith(CHECKED))
    return (yield)


#: Longest first, so that both workers end together. A group shares servers or models, so it runs on
#: one worker.
GROUPS = ("production", "prefect", "s3", "gpu")
#: Files whose tests share what takes seconds to train.
TOGETHER = tuple(f"tests/library/test_{name}.py" for name in ("evaluate_policy", "members"))
#: Long tests without a group, before the many short ones.
LONG = ("tests/library/test_on_a_device", "tests/test_reaper", "tests/library/test_processes")


#: Ids of all tests of the files that were asked for, also of those that `-m` leaves out.
COLLECTED = pytest.StashKey[list[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Skip CPU-only tests on other devices; group tests by their servers, and sort."""
    config.stash[COLLECTED] = [item.nodeid for item in items]
    for item in items:
        if mark := _kind(item):
            item.add_marker(mark)
        cpu_only = item.get_closest_marker("cpu_only")
        if cpu_only and (os.environ.get("RLHF_DEVICE") or "cpu") != "cpu":
            item.add_marker(pytest.mark.skip(reason=f"CPU only: {cpu_only.args[0]}"))
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_turn)


def _kind(item) -> str | None:
    """Return the mark of a test that `make test` leaves to a command of its own."""
    if item.nodeid.startswith("tests/production/"):
        return "site"
    whole = item.nodeid.startswith(WHOLE) and not item.nodeid.startswith(EACH_COMMIT)
    return "program" if whole else None


def _group(item) -> str | None:
    if item.nodeid.startswith("tests/production/"):
        return "production"
    if "s3_server" in item.fixturenames or item.get_closest_marker("s3"):
        return "s3"
    if item.nodeid.startswith("tests/benchmarks/test_gpu"):
        return "gpu"
    if item.nodeid.startswith(TOGETHER):
        return item.nodeid.split("::")[0]
    return "prefect" if item.nodeid.startswith("tests/flows/") else None


def _turn(item) -> int:
    group = _group(item)
    if group in GROUPS:
        return GROUPS.index(group)
    return len(GROUPS) + (not item.nodeid.startswith(LONG))
