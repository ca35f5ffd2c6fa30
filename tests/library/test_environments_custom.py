"""Rewards from custom functions: their location, and how they are called."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from rlhf.config import CustomConfig, PPOConfig
from rlhf.custom_code import ALLOWED, CustomCode
from rlhf.data.rows import PromptRow
from rlhf.environments import Reply, build_environment
from rlhf.environments.custom import CustomFunction
from rlhf.errors import ConfigError, TrainingError

BATCH = [
    Reply("tea?", "good", 2, True, "yes", {"n": 1}, 0, "other"),
    Reply([{"role": "user", "content": "jar?"}], "bad é", 3, False, None, {}, 1),
]


@pytest.fixture
def allowed(tmp_path, monkeypatch):
    """A folder that the operator allows."""
    folder = tmp_path / "allowed"
    folder.mkdir()
    monkeypatch.setenv(ALLOWED, os.pathsep.join(["/nowhere", str(folder)]))
    return folder


@pytest.fixture
def function(allowed):
    """Makes a function of this source; ends its process after the test."""
    made = []

    def make(source: str, seconds: float = 300, name: str = "reward", where: str | None = None):
        (allowed / "mine.py").write_text(source)
        place = where or str(allowed / "mine.py")
        config = CustomConfig(function=f"{place}:{name}", timeout_seconds=seconds)
        made.append(CustomFunction(config, "ppo.custom"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def fails(call, *args, kind=TrainingError) -> str:
    with pytest.raises(kind) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_it_sees_every_field_of_a_reply(function, tmp_path):
    seen = tmp_path / "seen.json"
    reward = function(
        "import json\n"
        "def reward(batch):\n"
        f"    open({str(seen)!r}, 'w').write(json.dumps(batch))\n"
        "    return [len(row['response']) for row in batch]\n"
    )
    assert reward(BATCH) == [4, 5]
    first, second = json.loads(seen.read_text())
    assert first == {
        "prompt": "tea?", "response": "good", "n_tokens": 2, "finished": True, "reference": "yes",
        "metadata": {"n": 1}, "group": 0, "reference_reply": "other",
        "reference_finished": None,
    }  # fmt: skip
    assert second["prompt"] == [{"role": "user", "content": "jar?"}]
    assert second["response"] == "bad é"


def test_a_module_in_a_package_with_its_own_imports(function, allowed):
    (allowed / "pack").mkdir()
    (allowed / "pack" / "__init__.py").write_text("")
    (allowed / "pack" / "helper.py").write_text("BONUS = 5\n")
    (allowed / "pack" / "score.py").write_text(
        "from .helper import BONUS\nimport mine\n"
        "def reward(batch):\n    return [BONUS] * len(batch)\n"
    )
    assert function("", where="pack.score")(BATCH) == [5, 5]


def test_a_file_by_a_path_from_the_working_directory_or_an_allowed_folder(
    function, allowed, monkeypatch
):
    source = "def reward(batch):\n    return [1] * len(batch)\n"
    assert function(source, where="mine.py")(BATCH) == [1, 1]
    monkeypatch.chdir(allowed.parent)
    assert function(source, where="allowed/mine.py")(BATCH) == [1, 1]


def test_what_a_module_loads_is_loaded_once_and_prints_harm_nothing(function):
    reward = function(
        "import os\ncalls = []\n"
        "def reward(batch):\n"
        "    print('{\"values\": [9, 9]}', flush=True)\n"
        "    os.write(1, b'noise')\n"
        "    calls.append(1)\n"
        "    return [len(calls)] * len(batch)\n"
    )
    assert [reward(BATCH), reward(BATCH)] == [[1, 1], [2, 2]]


def test_arrays_are_numbers_too(function):
    source = "import numpy\ndef reward(batch):\n    return numpy.array([1.5, 2])\n"
    assert function(source)(BATCH) == [1.5, 2]


def test_a_large_batch(function):
    reward = function("def reward(batch):\n    return [len(row['response']) for row in batch]\n")
    batch = [Reply("p", "x" * 300_000, 1, True)] * 10
    assert reward(batch) == [300_000] * 10


# --- where code may lie -----------------------------------------------------------------------

GOOD = "def reward(batch):\n    return [0] * len(batch)\n"


def refused(place: str) -> str:
    return fails(
        CustomFunction, CustomConfig(function=f"{place}:reward"), "ppo.custom", kind=ConfigError
    )


def test_nothing_is_allowed_unless_the_operator_says_so(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(GOOD)
    for value in (None, "", os.pathsep):
        monkeypatch.delenv(ALLOWED, raising=False)
        if value is not None:
            monkeypatch.setenv(ALLOWED, value)
        text = refused(str(tmp_path / "mine.py"))
        assert "not allowed here; the operator has to list its folder" in text
        assert ALLOWED in text


def test_outside_of_the_operators_folders(allowed, tmp_path, monkeypatch):
    outside = tmp_path / "allowed-not"
    outside.mkdir()
    (outside / "mine.py").write_text(GOOD)
    monkeypatch.chdir(outside)
    monkeypatch.syspath_prepend(str(outside))
    for place in (str(outside / "mine.py"), "mine.py", f"{allowed}/../allowed-not/mine.py"):
        assert "outside of the folders in RLHF_ALLOWED_CODE; move it" in refused(place)
    # A module is looked for in the allowed folders alone, whatever can be imported.
    assert "no such module in RLHF_ALLOWED_CODE" in refused("mine")
    assert "no such module" in refused("os")
    assert "no such file" in refused("other.py")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def rewards(batch):\n    return []\n", "no function 'reward'; it has rewards"),
        ("", "no function 'reward'; it has none"),
        ("def reward(:\n", "is no Python (invalid syntax"),
    ],
)
def test_what_can_be_seen_without_running_it(allowed, source, expected):
    (allowed / "mine.py").write_text(source)
    with pytest.raises(ConfigError, match=r"^x\.function = 'mine\.py:reward': mine\.py ") as caught:
        CustomCode("mine.py:reward", "x").check()
    assert expected in str(caught.value)


@pytest.mark.parametrize("source", [GOOD, "from elsewhere import reward", "from elsewhere import *",
                                    "reward = print"])  # fmt: skip
def test_names_that_may_be_functions(allowed, source):
    (allowed / "mine.py").write_text(source)
    CustomCode("mine.py:reward", "x").check()


def test_links_are_followed_before_the_folder_is_compared(allowed, tmp_path, monkeypatch):
    (tmp_path / "secret.py").write_text(GOOD)
    (allowed / "link.py").symlink_to(tmp_path / "secret.py")
    (allowed / "folder").symlink_to(tmp_path)
    for place in ("link.py", str(allowed / "link.py"), "link", "folder/secret.py", "folder.secret"):
        assert "outside of the folders" in refused(place)
    # An allowed folder may be given by a link itself.
    (tmp_path / "alias").symlink_to(allowed)
    (allowed / "mine.py").write_text(GOOD)
    monkeypatch.setenv(ALLOWED, str(tmp_path / "alias"))
    assert CustomCode("mine:reward", "x").file == allowed / "mine.py"


# --- what can go wrong in a call --------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return None", "failed (TypeError: it returned a NoneType; return a list of numbers)"),
        ("return 'ab'", "failed (TypeError: it returned a str; return a list of numbers)"),
        ("return [1, 'x']", "failed (TypeError: value 1 is a str; return numbers)"),
        ("return [True, 1]", "failed (TypeError: value 0 is a bool; return numbers)"),
        ("return [1]", "gave 1 values for 2 replies; it must give one for each"),
        ("return [1, float('nan')]", "is nan for the reply 'bad é'; it must be finite"),
        ("return [1 / 0]", "failed (ZeroDivisionError: division by zero); mend the function"),
        ("raise SystemExit(3)", "failed (SystemExit: 3)"),
        ("import os; os._exit(3)", "ended its process (exit status 3); mend the function"),
    ],
)
def test_wrong_results(function, body, expected):
    reward = function(f"def reward(batch):\n    {body}\n")
    text = fails(reward, BATCH)
    assert "ppo.custom.function = " in text
    assert expected in text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("reward = 5\n", "has no function 'reward'"),
        ("", "has no function 'reward'"),
        ("def reward():\n    return []\n", "takes 0 positional arguments but 1 was given"),
        ("def reward(a, b):\n    return []\n", "missing 1 required positional argument: 'b'"),
        ("import nonsense_module\n", "No module named 'nonsense_module'"),
        ("def reward(:\n", "SyntaxError"),
    ],
)
def test_the_signature_is_checked_before_training(renderer, allowed, source, expected):
    (allowed / "mine.py").write_text(source)
    config = PPOConfig(reward_fn="custom", custom={"function": "mine.py:reward"})
    with pytest.raises(ConfigError, match=r"on a dry batch of 2 replies: ppo\.custom\.f") as caught:
        build_environment(config, None, renderer, [PromptRow("tea?")])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(1000)",
        "while True: pass",
        # deaf to polite signals, and with a child of its own
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))\n"
        "    subprocess.run(['sleep', '1000'])",
    ],
)
def test_a_call_that_takes_too_long_is_interrupted(function, body):
    reward = function(
        f"import time, signal, subprocess\ndef reward(batch):\n    {body}\n", seconds=1
    )
    begun = time.monotonic()
    text = fails(reward, BATCH)
    assert time.monotonic() - begun < 500  # the function would take 1000 s
    assert "took more than timeout_seconds = 1 for 2 replies and was stopped; make it" in text
    assert reward.process is None


def test_after_an_interrupted_call_the_next_one_starts_afresh(function):
    reward = function(
        "import time\n"
        "def reward(batch):\n"
        "    time.sleep(1000 * (len(batch) - 1))\n"
        "    return [len(batch)] * len(batch)\n",
        seconds=0.7,
    )
    fails(reward, BATCH)
    while True:  # a busy machine needs more than that to start a process
        with suppress(TrainingError):
            assert reward(BATCH[:1]) == [1]
            break


def test_an_import_counts_into_the_time(function):
    text = fails(function("import time\ntime.sleep(1000)\n", seconds=0.5), BATCH)
    assert "took more than" in text


def gone(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return not path.exists() or path.read_text().split()[2] == "Z"


def test_what_the_function_started_ends_too(function, tmp_path):
    pid = tmp_path / "pid"
    reward = function(
        "import subprocess\n"
        "def reward(batch):\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        f"    open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "    child.wait()\n",
        seconds=1.5,
    )
    while not pid.exists() or not pid.read_text():  # a busy machine may need more to start a child
        fails(reward, BATCH)
    deadline = time.monotonic() + 60
    while not gone(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone(int(pid.read_text()))


def test_the_process_ends_with_its_function(function):
    reward = function(GOOD)
    reward(BATCH)
    pid = reward.process.pid
    assert not gone(pid)
    reward.close()
    assert gone(pid)


# --- in the environments ----------------------------------------------------------------------

LENGTHS = "def reward(batch):\n    return [len(row['response']) for row in batch]\n"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"reward_fn": "custom", "custom": {"function": "mine:reward"}}, "ppo.custom"),
        (
            {
                "multi_objective": True,
                "env_config": {
                    "components": {"own": {"type": "custom", "function": "mine:reward"}}
                },
            },
            "ppo.env_config.components.own",
        ),
        (
            {
                "env_type": "preference_comparison",
                "env_config": {"judge": "custom", "custom": {"function": "mine:reward"}},
            },
            "ppo.env_config.custom",
        ),
    ],
)
def test_every_environment_takes_a_function(renderer, allowed, options, field):
    (allowed / "mine.py").write_text(LENGTHS)
    environment = build_environment(PPOConfig(**options), None, renderer)
    batch = [Reply("p", text, 1, True) for text in ("aa", "aaaa")]
    scored = environment(batch)
    assert scored.totals[1] > scored.totals[0]
    assert next(iter(scored.components.values())).tolist() == [2, 4]
    state = environment.state_dict()
    assert list(state["code"]) == [f"{field}.function = 'mine:reward'"]
    environment.load_state_dict(state)
    environment.close()
    (allowed / "mine.py").write_text(LENGTHS + "# changed\n")
    changed = build_environment(PPOConfig(**options), None, renderer)
    changed.close()
    with pytest.raises(ConfigError, match="the code changed since the checkpoint; put it back"):
        changed.load_state_dict(state)


def test_time_limit_and_place_come_from_the_configuration(renderer, allowed):
    (allowed / "mine.py").write_text("import time\ndef reward(batch):\n    time.sleep(1000)\n")
    config = PPOConfig(
        reward_fn="custom", custom={"function": "mine:reward", "timeout_seconds": 0.5}
    )
    with pytest.raises(ConfigError, match=r"took more than timeout_seconds = 0\.5"):
        build_environment(config, None, renderer)
