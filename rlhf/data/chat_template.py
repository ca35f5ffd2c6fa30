"""Chat templates of pretrained models: completed for training, and probed for their turns.

A template is completed in the tokenizer, so that it is published: plain transformers then makes the
prompts of the training from the published files.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rlhf.data.template_cost import cost_error
from rlhf.errors import ConfigError

log = logging.getLogger(__name__)

#: Chat template for a base model without one: plain text, so that no token is added. The blank in
#: front of a reply belongs to its first token, as in the text that the base was trained on.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
#: The date of templates that write today's, in the format that they ask for.
PINNED_DATE = datetime(2024, 7, 26)

#: Texts that no template and no prompt holds.
USER_PROBE, REPLY_PROBE = "Probe7391x.", "Answer4826y."

#: A long text with what templates cut, put into other letters, or escape.
_TEXT_END = "Probe7392z."
_TEXT_PROBE = (
    f'{USER_PROBE} <b>A & b\'s "c"</b> {{x}} **É**\n\n- `1.5`\n\tword {"word " * 600}{_TEXT_END}'
)

_USER = {"role": "user", "content": USER_PROBE}
_REPLY = {"role": "assistant", "content": REPLY_PROBE}

Messages = Sequence[Mapping[str, Any]]


def render(
    tokenizer: Any, messages: Messages, generation_prompt: bool = True, parts: bool = False
) -> str:
    """Render messages; with `parts` contents are lists, as templates of multimodal models take.

    Raises whatever the template raises.
    """
    if parts:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt
    )


def complete_template(tokenizer: Any, model: str) -> None:
    """Give a tokenizer one chat template that starts replies and is the same on every day.

    Of named templates `default` is taken. A tokenizer without template gets `PLAIN_TEMPLATE`, after
    the tokens that it puts before a text. Today's date becomes `PINNED_DATE`. A template that
    ignores `add_generation_prompt` gets what it writes before an assistant's content.

    Raises:
        ConfigError: The template can't be used: it has no default, leaves out or alters contents,
            draws at random, computes the format of a date, needs other arguments, or opens replies
            differently each time.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(template))
            raise ConfigError(
                f"model {model!r}: its chat templates are named {names}, and none is `default`; "
                "save the one to train with as chat_template.jinja, alone"
            )
        template = template["default"]
    if template is not None and not isinstance(template, str):
        raise ConfigError(
            f"model {model!r}: its chat template is no text; write it to chat_template.jinja"
        )
    if template is None:
        log.warning(
            "model %r: it has no chat template, so that prompts are written as `User: …`, and "
            "replies behind `Assistant:`; if it was trained on chats, copy its chat_template.jinja",
            model,
        )  # fmt: skip
        template = _prefix(tokenizer) + PLAIN_TEMPLATE
    _refuse_costly(template, model)
    _refuse_random(template, model)
    tokenizer.chat_template = _pin_date(template, model)
    _check_content(tokenizer, model)
    _check_same_text(tokenizer, model)
    _add_generation_prompt(tokenizer, model)


@dataclass(frozen=True)
class TurnFormat:
    """Form of an assistant's turn in a chat template, found by rendering probes."""

    end: str | None = None
    """Token behind the content of the last turn; None if the template writes none."""
    parts: bool = False
    """Whether contents are lists of parts."""
    strips: tuple[bool, bool] = (False, False)
    """Whether blanks before and after the content are left out."""
    lead: str = ""
    """Blanks that belong to the reply's first token."""
    anchor: str = ""
    """Text before a reply while it is tokenised; its own tokens are left out.

    Some tokenizers treat the begin of a text like the begin of a word.
    """
    difference: str | None = None
    """Description of text between the generation prompt and the content of a past turn."""


def turn_format(tokenizer: Any) -> TurnFormat:
    """Probe a tokenizer's chat template; a part that it refuses to render keeps its default."""
    parts = _takes_parts(tokenizer)

    def with_reply(text: str) -> str:
        return render(tokenizer, [_USER, {**_REPLY, "content": text}], False, parts)

    try:
        prompt = render(tokenizer, [_USER], True, parts)
        whole = with_reply(REPLY_PROBE)
        strips = with_reply(f" \n{REPLY_PROBE}") == whole, with_reply(f"{REPLY_PROBE}\n ") == whole
    except Exception:  # whatever a template raises: the conversation is one that it refuses
        return TurnFormat(parts=parts)
    if REPLY_PROBE not in whole:
        return TurnFormat(parts=parts)
    before, _, after = whole.rpartition(REPLY_PROBE)
    end = _end_token(tokenizer, prompt, before, after)
    lead, difference = before.removeprefix(prompt), None
    if not before.startswith(prompt):
        n = len(os.path.commonprefix([before, prompt]))  # noqa: RUF071 - of characters, as meant
        lead, difference = "", f"{before[n:]!r}, and the start of a reply is {prompt[n:]!r}"
    elif lead.strip():
        lead, difference = "", f"{lead!r} more than the start of a reply"
    form = _reply_form(tokenizer, prompt, lead)
    return TurnFormat(end, parts, strips, *form, difference)


def tokens_after_end(tokenizer: Any) -> list[int]:
    """Return the tokens that a template writes behind the end of a chat, such as a line break.

    No stage trains or samples them; a reward model that others trained has read them.
    """
    turn = turn_format(tokenizer)
    if turn.end is None:
        return []
    whole = render(tokenizer, [_USER, _REPLY], False, turn.parts)
    # In their place: behind other text, or a token that takes blanks along, they may be others.
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(turn.end)
    return ids[len(ids) - ids[::-1].index(end) :] if end in ids else []


def encode_reply_text(tokenizer: Any, text: str, lead: str, anchor: str) -> list[int]:
    """Return the token ids of a lead and a text, as they are behind an anchor."""
    text = lead + text

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return ids["input_ids"]

    if anchor:
        before, ids = encode(anchor), encode(anchor + text)
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return encode(text)


def tokens_within(tokenizer: Any, text: str) -> list[str]:
    """Return the special and added tokens that occur in a text, longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    names = dict.fromkeys([*tokenizer.all_special_tokens, *added])
    return sorted((t for t in names if t.strip() and t in text), key=len, reverse=True)


def _prefix(tokenizer: Any) -> str:
    """Return template code for the tokens that a tokenizer puts before a text, such as BOS."""
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    ids = whole[: starts[0]] if starts and plain else []
    if not ids:
        return ""
    if ids == [tokenizer.bos_token_id]:
        return "{{ bos_token }}"
    text = "".join(tokenizer.convert_ids_to_tokens(ids))
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"


def _pin_date(template: str, model: str) -> str:
    """Replace today's date in a template by `PINNED_DATE`."""
    from jinja2 import nodes

    if "strftime_now" not in template:
        return template
    tree = _parsed(template, model)
    if any(macro.name == "strftime_now" for macro in tree.find_all(nodes.Macro)):
        return template  # pinned already
    uses = [n for n in tree.find_all(nodes.Name) if n.name == "strftime_now" and n.ctx == "load"]
    calls = [call for call in tree.find_all(nodes.Call) if call.node in uses]
    tests = [test for test in tree.find_all(nodes.Test) if test.node in uses]
    constants = [a.value for call in calls for a in call.args if isinstance(a, nodes.Const)]
    if len(constants) < len(calls) or len(calls) + len(tests) < len(uses):
        raise ConfigError(
            f"model {model!r}: its chat template computes the format of today's date, so its "
            "prompts would change from day to day; write a fixed date into the template"
        )
    formats = {text: PINNED_DATE.strftime(text) for text in constants}
    if not formats:
        return template
    log.warning(
        "model %r: its chat template writes today's date; for the same prompts on every day it "
        "is pinned to %s, in the published template too", model, next(iter(formats.values()))
    )  # fmt: skip
    dates = json.dumps(formats, ensure_ascii=False)
    # The template begins on a line of its own, as it did: the line break is not written.
    macro = f"{{%- macro strftime_now(format) -%}}{{{{ {dates}[format] }}}}{{%- endmacro %}}"
    return f"{macro}\n{template}"


def _parsed(template: str, model: str) -> Any:
    """Return a template's syntax tree."""
    from jinja2 import Environment, TemplateError

    try:
        return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_tags(template))
    except RecursionError:
        raise ConfigError(
            f"model {model!r}: its chat template is nested too deeply; mend chat_template.jinja"
        ) from None
    except TemplateError as error:
        raise ConfigError(
            f"model {model!r}: its chat template is no Jinja ({error}); mend chat_template.jinja"
        ) from None


def _without_tags(template: str) -> str:
    """Return a template without transformers' own tag, `generation`, which changes no text."""
    return re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)


def _refuse_costly(template: str, model: str) -> None:
    """Refuse a template that takes too much memory or time, before it is rendered here."""
    reason = cost_error(_without_tags(template))
    if reason:
        raise ConfigError(
            f"model {model!r}: its chat template {reason}; restore the one that was saved with the "
            "model"
        )


def _refuse_random(template: str, model: str) -> None:
    """Refuse a template that writes another text each time."""
    from jinja2 import nodes

    if "random" not in template and "lipsum" not in template:
        return
    tree = _parsed(template, model)
    drawn = [f"| {f.name}" for f in tree.find_all(nodes.Filter) if f.name == "random"]
    drawn += [f"{n.name}()" for n in tree.find_all(nodes.Name) if n.name == "lipsum"]
    if drawn:
        raise ConfigError(
            f"model {model!r}: its chat template draws text at random ({drawn[0]}), so that a "
            "prompt would have other tokens each time; write one fixed text there"
        )


def _check_content(tokenizer: Any, model: str) -> None:
    """Refuse a template that can't render a user's turn, or that leaves out its content."""
    try:
        text = render(tokenizer, [_USER], True, _takes_parts(tokenizer))
    except Exception as error:  # a template can raise anything
        problem = " ".join(str(error).split())[:150] or type(error).__name__
        raise ConfigError(
            f"model {model!r}: its chat template can't render a user's turn ({problem}); give a "
            "template that needs nothing but messages and add_generation_prompt"
        ) from None
    if USER_PROBE.lower() not in text.lower():
        raise ConfigError(
            f"model {model!r}: its chat template leaves out the content of a user's turn; give a "
            "template that writes message['content']"
        )


def _check_same_text(tokenizer: Any, model: str) -> None:
    """Refuse a template that cuts or alters the text of contents."""
    parts = _takes_parts(tokenizer)
    other = {"role": "user", "content": "Next."}
    probe = {"content": _TEXT_PROBE}
    chats = (
        ("a user", [{**_USER, **probe}]),
        ("a user", [{**_USER, **probe}, _REPLY, other]),
        ("the system", [{"role": "system", **probe}, other]),
        ("the assistant", [other, {**_REPLY, **probe}, other]),
    )
    warned = False
    for role, messages in chats:
        try:
            text = render(tokenizer, messages, True, parts)
        except Exception:  # it refuses such a chat
            continue
        begins = [m.start() for m in re.finditer(re.escape(USER_PROBE), text, re.IGNORECASE)]
        ends = _TEXT_END.lower() in text.lower()
        # A turn that is left out as a whole is told with the prompts that have one.
        if _TEXT_PROBE not in text and (begins or ends):
            begin = text[begins[0] :] if begins else ""
            same = len(os.path.commonprefix([begin, _TEXT_PROBE]))  # noqa: RUF071
            if " ".join(begin.split()).startswith(" ".join(_TEXT_PROBE.split())):
                if not warned:
                    log.warning(
                        "model %r: its chat template alters line breaks or blanks within %s's turn "
                        "(%r becomes %r), so that the model does not see them as they are", model,
                        role, _TEXT_PROBE[same:][:6], begin[same:][:6],
                    )  # fmt: skip
                warned = True
                continue
            raise ConfigError(
                f"model {model!r}: its chat template alters the content of {role}'s turn: of "
                f"{len(_TEXT_PROBE):,} characters, {_TEXT_PROBE[same:][:20]!r} at {same} became "
                f"{begin[same:][:20]!r}; write message['content'] there, without cuts or filters"
            )


def _add_generation_prompt(tokenizer: Any, model: str) -> None:
    """Add the start of a reply to a template that ignores `add_generation_prompt`."""
    parts = _takes_parts(tokenizer)
    if render(tokenizer, [_USER], True, parts) != render(tokenizer, [_USER], False, parts):
        return
    turns = ([_USER], [_USER, _REPLY, _USER])
    try:
        headers = {_header(tokenizer, messages, parts) for messages in turns}
    except Exception:  # it takes no assistant's turn, so there is nothing to learn from one
        return
    if all(header is not None and not header.strip() for header in headers):
        return  # the user's turn ends with what starts a reply
    header = headers.pop()
    if headers or header is None:
        raise ConfigError(
            f"model {model!r}: its chat template ignores add_generation_prompt, and its text "
            "before an assistant's content is not the same in every turn; add {% if "
            "add_generation_prompt %} with the start of a reply to chat_template.jinja"
        )
    # A blank at its end belongs to the reply's first token, as in the text that it stems from.
    text = json.dumps(header.rstrip(" "), ensure_ascii=False)
    start = f"{{% if add_generation_prompt %}}{{{{ {text} }}}}{{% endif %}}"
    tokenizer.chat_template = f"{tokenizer.chat_template.removesuffix(chr(10))}{start}"


def _header(tokenizer: Any, turns: Messages, parts: bool) -> str | None:
    """Return what the template writes between turns and the content of a reply to them.

    Raises:
        ValueError: It does not write all contents; or whatever the template raises.
    """
    prompt = render(tokenizer, turns, False, parts)
    whole = render(tokenizer, [*turns, _REPLY], False, parts)
    before = whole[: whole.rindex(REPLY_PROBE)]
    before.index(USER_PROBE)
    return before[len(prompt) :] if before.startswith(prompt) else None


def _takes_parts(tokenizer: Any) -> bool:
    """Return whether the template shows a content only if it is a list of parts."""
    for parts in (False, True):
        try:
            if USER_PROBE in render(tokenizer, [_USER], True, parts):
                return parts
        except Exception:
            continue
    return False


def _end_token(tokenizer: Any, prompt: str, before: str, after: str) -> str | None:
    """Return the token with which the text after a reply begins, unless it opens a turn."""
    rest = after.strip()
    if not rest or before.rstrip().endswith(rest):  # it always writes the start of a reply
        return None
    found = [t for t in tokens_within(tokenizer, rest) if rest.startswith(t)]
    opening = prompt[prompt.rfind(USER_PROBE) :].rstrip()
    return None if not found or opening.endswith(found[0]) else found[0]


def _reply_form(tokenizer: Any, prompt: str, lead: str) -> tuple[str, str]:
    """Return lead and anchor with which a reply has the tokens that it has after its prompt."""
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt + lead + REPLY_PROBE, add_special_tokens=False)["input_ids"]
    for form in (("", ""), (lead, ""), ("", "\n"), (lead, "\n")):
        if ids == [*start, *encode_reply_text(tokenizer, REPLY_PROBE, *form)]:
            return form
    return "", ""
