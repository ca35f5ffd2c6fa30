/* A conversation with one policy or two. Text of people and policies is set as text, never as markup. */
"use strict";

const $ = (id) => document.getElementById(id);
const made = (id) => $(id).content.firstElementChild.cloneNode(true);
let facts = { policies: [], scores: [], notes: [], preferences: "" };
let messages = [];      // turns up to the last user's that was answered
let open = null;        // the turn that waits for a choice, or whose replies are made
let abort = null;
let key = "";

async function ask(path, body) {
  const options = { headers: {}, signal: abort ? abort.signal : undefined };
  if (key) options.headers.authorization = `Bearer ${key}`;
  if (body) {
    options.method = "POST";
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  if (response.status === 401) {
    key = await askKey();
    return ask(path, body);
  }
  if (!response.ok) throw new Error(await reason(response));
  return response;
}

async function reason(response) {
  try { return (await response.json()).error.message; } catch { return `the server answered ${response.status}`; }
}

function askKey() {
  return new Promise((done) => {
    const dialog = $("ask-key");
    dialog.addEventListener("close", () => { const value = $("key").value.trim(); $("key").value = ""; done(value); }, { once: true });
    dialog.showModal();
  });
}

async function begin() {
  facts = await (await ask("/chat/facts")).json();
  $("file").textContent = facts.preferences;
  $("two").checked = facts.policies.length > 1;
  for (const note of facts.notes) $("notes").append(element("li", note));
  showTitle();
}

function showTitle() {
  // Two policies are not named before the vote, so that it is of their replies.
  const blind = $("two").checked && facts.policies.length > 1;
  $("title").textContent = blind ? "Which reply is better?" : facts.policies[0] || "Chat";
  document.title = $("title").textContent;
}

/* Characters that act on the display, such as those that turn the direction of text, written out. */
function visible(text) {
  const acts = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;
  return text.replace(acts, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function hint(text, tone = "") {
  $("hint").textContent = text;
  $("hint").className = `hint ${tone}`;
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  for (const id of ["two", "reset"]) $(id).disabled = is;
}

async function send(text) {
  if (open && !settle()) return;
  $("empty").hidden = $("notes").hidden = true;
  hint("");
  messages.push({ role: "user", content: text });
  const asked = made("turn-of-user");
  asked.querySelector(".text").textContent = visible(text);
  $("turns").append(asked);
  const turn = made("turn-of-policy");
  $("turns").append(turn);
  open = { asked, turn, replies: [] };
  await reply(choose());
}

/* The policies that reply: in random order if there are two, so that a side tells nothing. */
function choose() {
  if (!$("two").checked) return [0];
  const both = facts.policies.length > 1 ? [0, 1] : [0, 0];
  return Math.random() < 0.5 ? both : both.reverse();
}

async function reply(policies) {
  busy(true);
  abort = new AbortController();
  const box = open.turn.querySelector(".replies");
  const added = policies.map((policy) => {
    const shown = made("one-reply");
    shown.classList.add("growing");
    box.append(shown);
    const one = { policy, shown, result: null };
    open.replies.push(one);
    return one;
  });
  label();
  turnToEnd();
  for (const one of added) await fill(one);
  abort = null;
  busy(false);
  finish();
}

async function fill(one) {
  const text = one.shown.querySelector(".text");
  try {
    const response = await ask("/chat/reply", { messages, policy: one.policy });
    for await (const line of lines(response.body)) {
      if (line.error) throw new Error(line.error.message);
      if (line.text !== undefined) { text.textContent += visible(line.text); turnToEnd(); }
      if (line.reply) { one.result = line.reply; text.textContent = visible(line.reply.text); }
    }
    if (!one.result) throw new Error("the reply was broken off");
  } catch (error) {
    const said = one.shown.querySelector(".error");
    said.textContent = error.name === "AbortError" ? "Stopped; nothing of it is kept." : error.message;
    said.hidden = false;
  }
  one.shown.classList.remove("growing");
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

/* Names the columns, and offers what can be done with the replies. */
function finish() {
  open.replies = open.replies.filter((one) => one.result || open.replies.length === 1);
  label();
  const usable = open.replies.filter((one) => one.result);
  const votes = open.turn.querySelector(".votes");
  votes.replaceChildren();
  votes.hidden = false;
  if (usable.length === 2) {
    votes.append(button("A is better", () => vote(0, 1)), button("B is better", () => vote(1, 0)), button("No preference", () => keep(0)));
    hint("Say which reply is better, or go on without a preference.");
  } else {
    if (usable.length) { reveal(); $("text").focus(); }
    votes.append(button("Retry", retry));
    if (usable.length > 2) votes.hidden = true;
  }
  turnToEnd();
}

function button(text, act) {
  const made = element("button", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

/* Another reply beside the one that is there. */
function retry() {
  hint("");
  open.turn.querySelector(".votes").hidden = true;
  for (const one of open.replies.filter((one) => !one.result)) one.shown.remove();
  open.replies = open.replies.filter((one) => one.result);
  reply(open.replies.length ? [open.replies[0].policy] : choose());
}

async function vote(chosen, rejected) {
  const ids = [chosen, rejected].map((index) => open.replies[index].result.id);
  const buttons = [...open.turn.querySelectorAll("button")];
  buttons.forEach((each) => { each.disabled = true; });
  try {
    const { written } = await (await ask("/chat/vote", { chosen: ids[0], rejected: ids[1] })).json();
    keep(chosen, `Written to ${written}.`);
  } catch (error) {
    hint(error.message, "bad");
    buttons.forEach((each) => { each.disabled = false; });
  }
}

/* Goes on with a reply. */
function keep(index, said = "") {
  open.kept = index;
  open.replies.forEach((one, i) => {
    one.shown.classList.toggle("chosen", Boolean(said) && i === index);
    one.shown.classList.toggle("passed", i !== index);
  });
  reveal();
  const votes = open.turn.querySelector(".votes");
  votes.replaceChildren(element("span", said || "The conversation goes on with A."));
  hint("");
  if (said) votes.firstElementChild.className = "good";
  $("text").focus();
}

function label() {
  const two = open.replies.length > 1;
  open.turn.querySelector(".replies").classList.toggle("two", two);
  open.replies.forEach((one, i) => {
    one.shown.querySelector(".name").replaceChildren(...(two ? [element("span", i ? "Reply B" : "Reply A")] : []));
  });
}

/* Shows which policy wrote what, and how it was scored: only once that can't sway the vote. */
function reveal() {
  for (const one of open.replies.filter((one) => one.result)) {
    const { policy, scores, tokens, notes } = one.result;
    const name = one.shown.querySelector(".name");
    if (open.replies.length > 1 || facts.policies.length > 1) name.append(element("span", policy));
    const list = one.shown.querySelector(".facts");
    list.replaceChildren();
    for (const { name, value, note } of scores) {
      fact(list, name, value === null ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`);
      if (note) fact(list, "", note, "note");
    }
    fact(list, "tokens", String(tokens));
    for (const note of notes) fact(list, "", note, "note");
    list.hidden = false;
  }
}

function fact(list, name, value, className = "") {
  const row = document.createElement("div");
  if (name) row.append(element("dt", name));
  row.append(element("dd", value, className));
  list.append(row);
}

/* Appends the reply that the conversation goes on with; false if there is a choice to make first. */
function settle() {
  const usable = open.replies.filter((one) => one.result);
  if (usable.length > 1 && open.kept === undefined) {
    hint("Say first which reply is better, or choose “No preference”.", "bad");
    return false;
  }
  if (usable.length) messages.push({ role: "assistant", content: usable[open.kept || 0].result.text });
  else { messages.pop(); open.asked.remove(); open.turn.remove(); }
  const votes = open.turn.querySelector(".votes");
  if (!votes.querySelector("span")) votes.hidden = true;
  open = null;
  return true;
}

function turnToEnd() { window.scrollTo({ top: document.body.scrollHeight }); }

function grow() {
  const text = $("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value;
  if (!text.trim() || abort) return;
  if (open && open.replies.filter((one) => one.result).length > 1 && open.kept === undefined) { settle(); return; }
  $("text").value = "";
  grow();
  send(text);
});
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("composer").requestSubmit(); }
});
$("stop").addEventListener("click", () => { if (abort) abort.abort(); });
$("two").addEventListener("change", showTitle);
$("reset").addEventListener("click", () => {
  messages = [];
  open = null;
  for (const turn of [...document.querySelectorAll(".turn")]) turn.remove();
  $("empty").hidden = $("notes").hidden = false;
  hint("");
  $("text").focus();
});
begin().catch((error) => hint(error.message, "bad"));
