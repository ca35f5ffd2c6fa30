"""The command `rlhf serve`: a whole process, and what it refuses before it loads a model."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from flows.serve import serve
from rlhf.errors import ConfigError
from tasks.chat_models import ChatOptions
from tests.parrot import HOSTILE, write_parrot

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef-own"


def test_a_served_policy_answers_until_it_is_interrupted(tmp_path):
    folder = write_parrot(tmp_path / "parrot")
    command = [
        sys.executable, "-m", "flows.cli", "serve", str(folder), "--port", "0", "--temperature",
        "0", "--api-key", "OWN_KEY", "--preferences", str(tmp_path / "own.jsonl"), "--store",
        str(tmp_path / "store"),
    ]  # fmt: skip
    environment = {**os.environ, "OWN_KEY": KEY, "RLHF_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        shown = "".join(lines)
        assert KEY not in shown
        found = re.search(r"API: (http://127\.0\.0\.1:\d+/v1)", shown)
        assert found, shown + (process.stderr.read() if process.stderr else "")
        with openai.OpenAI(base_url=found[1], api_key=KEY, max_retries=5) as client:
            made = client.chat.completions.create(
                model="parrot", messages=[{"role": "user", "content": "tea?"}]
            )
        assert made.choices[0].message.content == HOSTILE
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert "Traceback" not in errors
        assert process.returncode in (0, 130)


def refusal(**options) -> str:
    with pytest.raises(ConfigError) as caught:
        serve("nobody", **options)
    return str(caught.value)


def test_what_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OWN_KEY", KEY)
    monkeypatch.setenv("SHORT_KEY", "short")
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        assert "set a key in an environment variable" in refusal(host=host)
    for given in ("UNSET_KEY", KEY, "sk-secret"):
        said = refusal(api_key=given)
        assert "names no environment variable that is set" in said
        assert given not in said  # it may be the key itself
    said = refusal(api_key="SHORT_KEY")
    assert "--api-key SHORT_KEY: holds a key of fewer than 16 characters" in said
    assert "short," not in said
    assert "can't" not in refusal(host="192.0.2.1", api_key="OWN_KEY", port=0)
    assert "--host 192.0.2.1 --port 0: " in refusal(host="192.0.2.1", api_key="OWN_KEY", port=0)
    assert "--host no.such.host.invalid: " in refusal(
        host="no.such.host.invalid", api_key="OWN_KEY"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(port=port)
        assert f"--port {port}: address already in use; another port, or 0" in said
    assert "ends in .jsonl" in refusal(options=ChatOptions(preferences=tmp_path / "x.csv"))
    assert list(tmp_path.iterdir()) == []
