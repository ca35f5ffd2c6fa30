"""Generator of docs/mistakes.md: `python -m docs.generate_mistakes > docs/mistakes.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

HEAD = """# The likeliest mistakes, and what they say

Each was made for real. A message names the field, the value and what to do; there is no traceback.
Exit code 2 is a mistake in what was given, 3 a gate's no, 1 anything else. `--debug`, at any place
of any command, shows the traceback too (in the processes of a deployment: `RLHF_TRACEBACK=1`).

In the examples `mine.yaml` is a configuration for `pairs.jsonl` and the model in the folder `base`.
`rlhf preflight` does the checks that `rlhf run` begins with.

This page is written by `python -m docs.generate_mistakes > docs/mistakes.md`, and a test makes the
mistakes again.
"""


@dataclass(frozen=True)
class Mistake:
    """A mistake with the message that it gives."""

    title: str
    command: str
    """Words behind `rlhf`, or a whole command in parentheses if it is another."""
    message: str
    """As it is printed, without `error: `."""
    more: str = ""
    """What else to know."""
    key: str = ""
    """How the test makes it; empty for the command itself."""


MISTAKES = (
    Mistake(
        "The configuration's path is wrong",
        "run configs/quickstrat.yaml",
        "config = 'configs/quickstrat.yaml': no such file; give the path of a YAML preset, for "
        "example configs/quickstart.yaml",
    ),
    Mistake(
        "The data's path is wrong",
        "run mine.yaml --data.source=pears.jsonl",
        "data.source = 'pears.jsonl': no such file or folder; give an existing path, an s3:// URI "
        "or a hub dataset id",
    ),
    Mistake(
        "A CSV file without the columns",
        "preflight mine.yaml --data.source=notes.csv",
        "data.source: looks like data for supervised fine-tuning: there is nothing to compare in "
        "these columns: id (str 0); text (str good quiet); give two replies to each prompt and "
        "which is better, or replies with ratings; docs/data.md shows the formats; demonstrations "
        "beside pairs are given by data.sft_source (in notes.csv; rlhf data inspect notes.csv "
        "shows more)",
        "Columns of other names: `--data.prompt_column=question`, `data.chosen_column`, "
        "`data.rejected_column`.",
    ),
    Mistake(
        "Data with prompts only",
        "preflight mine.yaml --data.source=prompts.jsonl",
        "data.source: there is nothing to compare in these columns: prompt (str What is 0?); give "
        "two replies to each prompt and which is better, or replies with ratings; docs/data.md "
        "shows the formats (in prompts.jsonl; rlhf data inspect prompts.jsonl shows more)",
        "Prompts beside pairs are `data.prompts_source`.",
    ),
    Mistake(
        "The base model's folder holds no model",
        "preflight mine.yaml --base.path=not-a-model",
        "base.path = 'not-a-model': no model there (no config.json); give the folder of a whole "
        "model",
    ),
    Mistake(
        "A hub id without a network, or misspelt",
        "preflight mine.yaml --base.path=acme/no-such-model",
        "base.path = 'acme/no-such-model': no such folder here, and the hub gives no config.json "
        "of that name (LocalEntryNotFoundError); give an existing folder, s3://bucket/prefix, "
        "artifact:<digest> or a hub id",
        "With `HF_HUB_OFFLINE=1` it says so at once, else after the hub's own retries.",
    ),
    Mistake(
        "Weights that are no safetensors",
        "preflight mine.yaml --base.path=pickled",
        "base.path = 'pickled': its weights are a pickle (pytorch_model.bin), and only safetensors "
        "are read; save it again with save_pretrained",
    ),
    Mistake(
        "A base without a chat template",
        "preflight mine.yaml --base.path=plain",
        "model 'plain': it has no chat template, so that prompts are written as `User: …`, and "
        "replies behind `Assistant:`; if it was trained on chats, copy its chat_template.jinja",
        "A warning: a base that is no chat model needs none.",
        key="template",
    ),
    Mistake(
        "A typo in an option",
        "run mine.yaml --ppo.kl_coeff=0.1",
        "command line: ppo.kl_coeff is not a field of the configuration; did you mean ppo.kl_coef?",
    ),
    Mistake(
        "A typo in the file",
        "run typo.yaml",
        "ppo.kl_coeff is not a field of the configuration; did you mean ppo.kl_coef? (from "
        "typo.yaml)",
    ),
    Mistake(
        "A value of another kind",
        "run mine.yaml --ppo.kl_coef=big",
        "ppo.kl_coef = 'big': must be a number (from command line)",
    ),
    Mistake(
        "Options before the file",
        "run --ppo.kl_coef=0.1",
        "Unknown option: --ppo.kl_coef=0.1; overrides stand behind the file: rlhf run "
        "configs/quickstart.yaml --ppo.kl_coef=0.1",
    ),
    Mistake(
        "A misspelt command",
        "rn mine.yaml",
        'Unknown command "rn". Did you mean "run"? Available commands: config, artifacts, data, '
        "server, init, preflight, runs, status, ..; see rlhf --help",
    ),
    Mistake(
        "Replies longer than what is trained on",
        "preflight mine.yaml --ppo.max_new_tokens=128",
        "ppo.max_new_tokens = 128 leaves no room for a prompt in reward_model.max_length = 128; "
        "lower it, or raise reward_model.max_length (from command line and mine.yaml)",
    ),
    Mistake(
        "Replies longer than the model's context",
        "preflight mine.yaml --ppo.max_new_tokens=300 --sft.max_length=1024 "
        "--reward_model.max_length=1024",
        "ppo.max_new_tokens = 300 leaves no room for a prompt in the context of base.path = "
        "'base', which is 256 tokens; lower it, or name a base with a longer context",
        "A `max_length` beyond the context is no mistake: the context holds.",
    ),
    Mistake(
        "A mini-batch larger than its chunk",
        "run mine.yaml --ppo.mini_batch_size=256",
        "ppo: mini_batch_size = 256 exceeds chunk_size = 128; lower it to at most chunk_size (from "
        "command line)",
    ),
    Mistake(
        "LoRA on layers that the model has not",
        "preflight mine.yaml --sft.lora.target_modules=q_prj",
        "base.path = 'base': rehearsed in small, SFT fails: sft.lora.target_modules = 'q_prj': "
        "this model has no linear layer of the name 'q_prj'; choose from down_proj, gate_proj, "
        "k_proj, o_proj, q_proj, up_proj, v_proj, or write all-linear",
    ),
    Mistake(
        "CUDA on a machine without",
        "preflight mine.yaml --runtime.device=cuda",
        "base.path = 'base': rehearsed in small, SFT fails: runtime.device = 'cuda', but torch "
        "finds no such device here; set it to auto or cpu, or install a torch that was built for "
        "it",
        key="cuda",
    ),
    Mistake(
        "A language model as the reward model",
        "preflight mine.yaml --rl-reward-model-path=base",
        "ppo.reward_model_path = 'base': must be a sequence-classification model with one label, "
        "and this one is LlamaForCausalLM; give a reward model, or none to train one",
    ),
    Mistake(
        "A reward model, or policy, that its gate rejects",
        "run mine.yaml",
        "gate-reward-model: accuracy = 0.48, needs ≥ 0.55",
        "Exit code 3: neither a crash nor a success. [gates.md](gates.md#when-a-gate-says-no) has "
        "what to do for each rule; the report shows the pairs that it got wrong.",
        key="gate",
    ),
    Mistake(
        "Promoting what no gate has judged",
        "promote 3f2a91c04d",
        "3f2a91c04d: no gate has judged it; to make it the champion of default all the same: "
        "--unapproved --why '<the reason>'",
        key="unapproved",
    ),
    Mistake(
        "A full disk",
        "run mine.yaml",
        "file:///home/me/project/.rlhf/store: can't write blobs/3f2a91c04d: No space left on "
        "device; make room there, then try again",
        "What is complete stays, and the same command goes on. `rlhf artifacts gc` lists what "
        "nothing refers to; `runtime.cache_gb` bounds the cache of fetched artifacts.",
        key="disk",
    ),
    Mistake(
        "A store's URI with a slash too few",
        "run mine.yaml --store=s3:/bucket/prefix",
        "store: begins like a URI and has no ://; write s3://bucket/prefix or file:///folder (a "
        "folder of that name: ./ before it) (from command line)",
    ),
    Mistake(
        "S3 without credentials",
        "artifacts ls --store s3://no-such-bucket/x",
        "s3://no-such-bucket/x: can't list manifests/: no AWS credentials; set AWS_ACCESS_KEY_ID "
        "and AWS_SECRET_ACCESS_KEY, or a profile or role of the AWS chain",
        key="credentials",
    ),
    Mistake(
        "No server for a run's state",
        "status my-run",
        "my-run: needs the Prefect server that the runs are on; set PREFECT_API_URL",
        "`rlhf runs` without a server lists the runs of this machine; `rlhf watch` shows them.",
    ),
    Mistake(
        "No worker was started",
        "(prefect deployment run rlhf-pipeline -p preset=mine)",
        "train-policy/train-policy-gpu waits for a worker of pool gpu: `prefect worker start "
        "--pool gpu`, or its concurrency limit is reached",
        "In the log of the run, every minute; `retries.scheduled_seconds` bounds the wait.",
        key="worker",
    ),
    Mistake(
        "Two trainings in one folder",
        "run mine.yaml",
        "checkpoints work: another process trains with this folder; wait for it, or give this run "
        "another folder",
        "The same command twice at a time is no mistake: the second waits for the first, and takes "
        "its result.",
        key="lock",
    ),
    Mistake(
        "An artifact that is not there",
        "promote 3f2a91c04d",
        "file:///home/me/project/.rlhf/store: there is no artifact 3f2a91c04d; `rlhf artifacts ls` "
        "shows those there are",
    ),
    Mistake(
        "No champion to talk to",
        "export champion out",
        "file:///home/me/project/.rlhf/store has no champion of the line default (lines that have: "
        "none); it holds no policy either: train one by rlhf run, name the store by --store, or a "
        "model's folder",
    ),
    Mistake(
        "A stage before those that it needs",
        "stage train-policy mine.yaml",
        "train-policy: data is missing: prepare-data has not run with this configuration; run "
        "`rlhf stage prepare-data` first, or give --input <role>=<artifact>",
    ),
    Mistake(
        "A tracker that is not installed",
        'preflight mine.yaml --tracking.trackers=["wandb"]',
        "tracking.trackers = 'wandb': that package is not installed; run `pip install wandb`, or "
        "choose others (tracking.trackers = [] for none)",
        key="wandb",
    ),
    Mistake(
        "GGUF without its extra",
        "export champion out --format gguf",
        "--format gguf: llama-cpp-python, which checks the file, is not installed; pip install "
        "'rlhf-pipeline[gguf]'",
        key="llama_cpp",
    ),
    Mistake(
        "Another version of Python",
        "(python3.10 -m pip install .)",
        "Package 'rlhf-pipeline' requires a different Python: 3.10.14 not in '>=3.11'",
        "pip's own message; `make quickstart PYTHON=python3.11` names another Python.",
        key="python",
    ),
)


def page() -> str:
    """Render the page."""
    return HEAD + "".join(f"\n{line}\n" for mistake in MISTAKES for line in _section(mistake))


def _section(mistake: Mistake) -> Iterator[str]:
    is_other = mistake.command.startswith("(")
    command = mistake.command.strip("()") if is_other else f"rlhf {mistake.command}"
    label = "warning" if mistake.key in ("template", "worker") else "error"
    yield f"## {mistake.title}"
    # Wrapped by the reader: the message is one line.
    yield f"```sh\n{_quoted(command)}\n```"
    text = mistake.message.replace("<", "&lt;").replace("*", "\\*")
    yield f"> {label}: {text}"
    if mistake.more:
        yield mistake.more


def _quoted(command: str) -> str:
    """Return a command as a shell takes it: brackets in quotes."""
    return " ".join(f"'{word}'" if "[" in word else word for word in command.split(" "))


if __name__ == "__main__":
    sys.stdout.write(page())
