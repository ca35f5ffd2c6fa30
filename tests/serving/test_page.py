"""The page of the server in a real browser: chat, votes, hostile text, phones and the dark."""

from __future__ import annotations

import json
import re

import pytest

from tests.parrot import HOSTILE
from tests.report.test_browser import CUT_OFF, SQUEEZED, UNNAMED
from tests.serving.conftest import OTHER, running

pytestmark = pytest.mark.browser
#: The hostile reply as the page shows it: characters that act on the display are written out.
SHOWN = HOSTILE.replace("\x1b", "\\u001b").replace("\u202e", "\\u202e")
#: Waits until a condition of the page holds; its end is the browser's time limit.
UNTIL = """
new Promise(done => {{
  const look = () => ({condition}) ? done(true) : requestAnimationFrame(look);
  look();
}})
"""
ANSWERED = "!document.getElementById('send').hidden"


def until(page, condition):
    assert page.evaluate(UNTIL.format(condition=condition))


def send(page, text):
    """Write a message as a person does, and wait for all replies to it."""
    page.evaluate(
        f"(() => {{ const t = document.getElementById('text'); t.value = {json.dumps(text)};"
        " document.getElementById('composer').requestSubmit(); })()"
    )
    until(page, f"document.querySelectorAll('.policy').length && {ANSWERED}")


def press(page, name):
    """Press the button of this name that is shown."""
    return page.evaluate(
        "(() => { const found = [...document.querySelectorAll('button')].filter("
        f"b => b.textContent === {json.dumps(name)} && b.checkVisibility());"
        " found.at(-1).click(); return found.length; })()"
    )


def texts(page, what=".reply .text"):
    return page.evaluate(f"[...document.querySelectorAll('{what}')].map(e => e.textContent)")


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def votes(server):
    """Returns the votes that were added since the test began."""
    before = rows_of(server.preferences) if server.preferences.exists() else []

    def added():
        rows = rows_of(server.preferences) if server.preferences.exists() else []
        assert rows[: len(before)] == before
        return rows[len(before) :]

    return added


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_a_conversation_of_votes(browser, server, votes, tmp_path, width, dark):
    page = browser.visit(server.url, width, 844, dark)
    until(page, "document.getElementById('file').textContent")
    page.screenshot(tmp_path / f"begin-{width}-{dark}.png")
    send(page, "Which tea has no caffeine?")
    # Until the vote nothing tells which policy wrote what, or how it was scored.
    assert sorted(texts(page)) == sorted([SHOWN, OTHER])
    shown = page.evaluate("document.body.innerText")
    assert "parrot" not in shown
    assert "judge" not in shown
    page.screenshot(tmp_path / f"vote-{width}-{dark}.png")
    send(page, "an impatient message")  # is not sent before a choice
    assert "Say first which reply is better" in page.evaluate("document.body.innerText")
    assert len(texts(page, ".user .text")) == 1
    page.evaluate("document.getElementById('text').value = ''")
    better = "A" if texts(page)[0] == OTHER else "B"
    press(page, f"{better} is better")
    until(page, "document.querySelector('.chosen')")
    assert texts(page, ".chosen .text") == [OTHER]
    shown = page.evaluate("document.body.innerText")
    assert "parrot" in shown
    assert "Written to preferences.jsonl." in shown
    assert re.search(r"judge\s+[+−]\d+\.\d{3}", shown)
    send(page, "And which has most?")
    press(page, "No preference")
    (row,) = votes()
    assert (row["chosen"], row["rejected"]) == (OTHER, HOSTILE)
    assert row["prompt"] == [{"role": "user", "content": "Which tea has no caffeine?"}]
    assert page.problems == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for check in (CUT_OFF, SQUEEZED, UNNAMED):
        assert page.evaluate(check) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) is dark
    shot = page.screenshot(tmp_path / f"chat-{width}-{dark}.png")
    assert shot.stat().st_size > 10_000
    # The second turn was asked behind the preferred reply.
    assert page.evaluate("messages.map(m => m.content)")[1] == OTHER


def test_text_never_becomes_markup(browser, server):
    page = browser.visit(server.url)
    until(page, "document.getElementById('file').textContent")
    attack = "<img src=x onerror=\"document.title='asked'\"><script>document.title='s'</script>"
    send(page, attack)
    press(page, "No preference")
    send(page, "again")
    assert texts(page, ".user .text")[0] == attack
    assert SHOWN in texts(page)
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    assert page.evaluate("document.title") == "Which reply is better?"
    # Were it markup all the same, the policy of the page would run no code of it.
    page.evaluate(f"document.querySelector('main').insertAdjacentHTML('beforeend', {attack!r})")
    page.evaluate("new Promise(done => setTimeout(done, 200))")
    assert page.evaluate("document.title") == "Which reply is better?"


def test_retry_stop_and_a_new_conversation(browser, server, votes):
    page = browser.visit(server.url)
    until(page, "document.getElementById('file').textContent")
    page.evaluate("document.getElementById('two').click()")
    assert "parrot" in page.evaluate("document.title")
    send(page, "tea?")
    assert texts(page) == [SHOWN]
    assert "tokens" in page.evaluate("document.body.innerText")
    press(page, "Retry")
    until(page, f"document.querySelectorAll('.reply').length === 2 && {ANSWERED}")
    press(page, "A is better")
    # The policy is greedy: both are the same, and nothing is written.
    until(page, "document.body.innerText.includes('no other reply differs')")
    assert votes() == []
    press(page, "No preference")
    send(page, "x" * 2000)  # beyond the context
    assert "the context is full" in page.evaluate("document.body.innerText")
    send(page, "a shorter one")
    assert texts(page)[-1] == SHOWN
    assert page.evaluate("messages.map(m => m.role)") == ["user", "assistant", "user"]
    page.evaluate(
        "(() => { const t = document.getElementById('text'); t.value = 'once more';"
        " document.getElementById('composer').requestSubmit();"
        " document.getElementById('stop').click(); })()"
    )
    until(page, ANSWERED)
    assert "Stopped; nothing of it is kept." in page.evaluate("document.body.innerText")
    press(page, "New conversation")
    assert texts(page, ".turn") == []
    assert page.evaluate("messages.length") == 0
    bad = [p for p in page.problems if "status of 400" not in p]
    assert bad == []


def test_a_server_with_a_key_asks_for_it(browser, chat_models, tmp_path):
    key = "0123456789abcdef-own"
    with running(chat_models, tmp_path / "x.jsonl", key=key) as server:
        page = browser.visit(server.url)
        until(page, "document.getElementById('ask-key').open")
        page.evaluate(f"document.getElementById('key').value = '{key}'")
        press(page, "Use it")
        until(page, "document.getElementById('file').textContent")
        send(page, "tea?")
        assert len(texts(page)) == 2
        assert key not in page.evaluate("document.documentElement.outerHTML")
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
