"""Render gpu.md from gpu.json; missing measurements are left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]
GIB = 1024
#: Cell of a missing measurement.
NOTHING = "–"
#: As `precision.FLOAT32_LIMIT`; this module can't import torch, which may be missing.
FLOAT32_LIMIT = 1e-3
UNKNOWN_GPU = "GPU unknown (section environment did not run)"
LARGEST = {
    "decode": "decoding at once",
    "micro_batch": "micro-batch",
    "micro_batch_checkpointing": "micro-batch, gradient checkpointing",
}


@dataclass(frozen=True)
class Run:
    """Properties of the whole run that tables refer to."""

    device: str
    tiny: bool
    #: Rates of large matrix products by precision.
    ceilings: Values

    def model(self, size: str) -> str:
        """Return the model's name; a smoke test has one tiny model for all sizes."""
        return "tiny" if self.tiny else size


def markdown(result: Values) -> str:
    """Return the whole report."""
    sections: Values = result["sections"]
    parts = [_head(result), _overview(sections)]
    ceilings = _results(sections, "rates").get("matmul_gflops_per_second", {})
    run = Run(result["device"], result["tiny"], ceilings)
    for name, section in sections.items():
        values = section.get("results")
        if not values or name not in RENDERERS:
            continue
        try:
            text = RENDERERS[name](values, run)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            text = f"Incomplete ({type(error).__name__}: {error}); gpu.json has what there is."
        parts.append(f"## {name}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; columns without a value are left out."""
    cells = list(rows)
    columns = [
        i for i in range(len(header))
        if not cells or any(row[i] is not None and row[i] != "" for row in cells)
    ]  # fmt: skip
    lines = ["| " + " | ".join(header[i] for i in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(shown(row[i]) for i in columns) + " |" for row in cells]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Format a cell: numbers with three digits, other values as they are."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value).replace("|", "\\|").replace("\n", " ")
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _results(sections: Values, name: str) -> Values:
    return sections.get(name, {}).get("results") or {}


def _head(result: Values) -> str:
    environment = _results(result["sections"], "environment")
    if result["device"] == "cpu":
        title = "# PPO on a CPU"
    elif environment.get("gpu"):
        title = f"# PPO on one {environment['gpu']}"
    else:
        title = f"# PPO, {UNKNOWN_GPU}"
    size = "tiny sizes, for a test of the script" if result["tiny"] else "full sizes"
    return (
        f"{title}\n\n{result['started']}, {shown(result['seconds'])} s, device "
        f"{result['device']}, {size}. Packages missing: {result['missing_packages'] or 'none'}. "
        f"Archive of trained models: {result.get('archive') or 'not read'}."
    )


def _overview(sections: Values) -> str:
    rows = [
        (name, s["status"], s.get("seconds"), s.get("reason")) for name, s in sections.items()
    ]  # fmt: skip
    return table(("section", "status", "seconds", "why"), rows)


def _environment(values: Values, run: Run) -> str:
    memory = values.get("gpu_memory_mib")
    packages = values.get("packages", {})
    rows = [
        ("GPU", values.get("gpu") or ("none, a CPU" if run.device == "cpu" else "unknown")),
        ("GPU memory, GiB", memory and memory / GIB),
        ("multiprocessors", values.get("multiprocessors")),
        ("driver", values.get("driver")),
        ("CUDA of torch", values.get("cuda")),
        ("CPU cores", values.get("cores")),
        ("Python", values.get("python")),
        *((name, version or "not installed") for name, version in packages.items()),
    ]
    return table(("what", "value"), [row for row in rows if row[1] is not None])


def _tests(values: Values, _: Run) -> str:
    counts = ", ".join(f"{values[n]} {n}" for n in ("passed", "failed", "errors", "skipped"))
    failures = "".join(f"\n- {failure}" for failure in values["failures"])
    return f"`pytest {' '.join(values['selection'])}`: {counts}.{failures}"


def _precision(values: Values, run: Run) -> str:
    rows = [
        ("random, " + run.model("124m") if model == "random_124m" else model, way, *(
            _number(by_reference[reference][error])
            for reference in ("against_float32_packed", "against_same_precision_packed")
            for error in ("largest_ratio_error", "mean_ratio_error")
        ))
        for model, ways in values.items() for way, by_reference in ways.items()
    ]  # fmt: skip
    references = ("float32 packed", "same precision packed")
    errors = [f"{e}, against {r}" for r in references for e in ("largest", "mean")]
    return (
        "\\|ratio − 1\\| of a reply token's probability, same weights and tokens. In float32 the "
        f"largest may be {FLOAT32_LIMIT:g}; bfloat16 is reported, not judged.\n\n"
        "- packed: rows laid end to end without padding, as PPO scores them.\n"
        "- padded: rows of one length, as transformers computes them.\n"
        "- shuffled: packed, in random micro-batches, as optimisation computes them.\n"
        "- decoded: token by token with a cache, as sampling computes them.\n\n"
        + table(("model", "computed", *errors), rows)
    )


def _resume(values: Values, _: Run) -> str:
    rows = [
        (name.rpartition(" / ")[0] or name, o["mode"], o["bit_equal"],
         o.get("undisturbed_runs_equal"), o["finding"], o["refused"],
         "; ".join(o["nondeterministic"]))
        for name, o in values.items()
    ]  # fmt: skip
    return table(
        ("options", "mode", "bit-equal", "two undisturbed runs equal", "difference",
         "refused by strict mode", "torch warned of"), rows,
    )  # fmt: skip


def _cache(values: Values, _: Run) -> str:
    rows = [
        (name, phase, *_memory(peaks), values[name]["seconds"][phase])
        for name in ("on", "off")
        for phase, peaks in values[name]["peaks"].items()
    ]
    equal = (
        f"Same replies: {shown(values['same_replies'])}; largest difference of a weight: "
        f"{shown(values['largest_weight_difference'])}."
    )
    header = ("optimize_device_cache", "phase", "peak in use, GiB", "peak held, GiB", "seconds")
    return equal + "\n\n" + table(header, rows)


def _learning(values: Values, run: Run) -> str:
    judged = not run.tiny
    bars, met = values.get("bars", {}), values.get("bars_met", {})
    rows = [
        (
            name.replace("_", " "), values[name],
            _bar(name, bars[name]) if judged and name in bars else None,
            met.get(name) if judged else None,
            ", ".join(map(shown, cpu)) if judged else None,
            values[f"{name}_within_cpu_seeds"] if judged else None,
        )
        for name, cpu in values["cpu_seeds"].items()
    ]  # fmt: skip
    header = ("measure", "here", "bar", "met", "seeds 0, 1, 2 on a CPU",
              "between lowest and highest CPU seed")  # fmt: skip
    return (
        f"{values['precision']}, {values['updates']} updates in "
        f"{shown(values['seconds_training'])} s; reward model's accuracy "
        f"{shown(values['reward_model_accuracy'])}; gold {shown(values['gold_before'])} → "
        f"{shown(values['gold_after'])}; share of replies ended by an end token "
        f"{shown(values['eos_rate'])}. Gold is the world's true reward, which no stage sees.\n\n"
        + table(header, rows)
    )


def _bar(name: str, bar: float) -> str:
    return f"{'at most' if name.startswith('kl') else 'at least'} {bar:.2f}"


def _rates(values: Values, _: Run) -> str:
    rows = [(name, _number(rate, 1e3)) for name, rate in values["matmul_gflops_per_second"].items()]
    n = values["matmul_shape"][0]
    text = table((f"product of {n} × {n} matrices", "TFLOP/s"), rows)
    if "copy_gb_per_second" in values:
        text += f"\n\nCopy on the device: {shown(values['copy_gb_per_second'])} GB/s (10^9 bytes "
        text += "read and written)."
    return text


def _rollouts(values: Values, run: Run) -> str:
    rows = [
        (name, r["reply_tokens"], r["seconds"], r["reply_tokens_per_second"],
         r["steps_per_second"], _number(r["gflops_per_second"], 1e3),
         _share(r["gflops_per_second"], run, "bf16"), *_memory(r))
        for name, r in values.items() if isinstance(r, dict)
    ]  # fmt: skip
    return (
        f"Model {run.model(values['size'])}, bf16. `full`: all replies have the greatest length; "
        "`varying`: geometric reply lengths.\n\n"
    ) + table(
        ("lengths and rows", "reply tokens, all rows", "seconds", "reply tokens/s",
         "decoding steps/s", "TFLOP/s", "of the matmul rate", "peak in use, GiB",
         "peak held, GiB"), rows,
    )  # fmt: skip


def _updates(values: Values, run: Run) -> str:
    rows = [
        (name, phase, p["seconds"], p["tokens_per_second"], _number(p["gflops_per_second"], 1e3),
         _share(p["gflops_per_second"], run, "fp32" if "fp32" in name else "bf16"),
         *_memory(p))
        for name, update in values.items() if isinstance(update, dict)
        for phase, p in update["phases"].items()
    ]  # fmt: skip
    return (
        f"Model {run.model(values['size'])}. Tokens are the chunk's prompt and reply tokens, "
        "counted once although optimisation passes over them twice (`num_ppo_epochs` 2); so the "
        "rollout's rate here is not that of the rollouts sections, which count reply tokens "
        "only.\n\n"
    ) + table(
        ("run", "phase", "seconds", "tokens/s", "TFLOP/s", "of the matmul rate",
         "peak in use, GiB", "peak held, GiB"), rows,
    )  # fmt: skip


def _largest(values: Values, run: Run) -> str:
    rows = []
    for name, label in LARGEST.items():
        search = values.get(name)
        if not search:
            continue
        best = search["fitted"][-1] if search["fitted"] else None
        rows.append((
            label, best["rows"] if best else "none", search["out_of_memory_at"] or NOTHING,
            search.get("searched_to", NOTHING), best and best["seconds"],
            *(_memory(best) if best else (None, None)),
        ))  # fmt: skip
    if not rows:
        return f"Model {run.model('500m')}; so far: {values.get('progress', 'nothing')}."
    return f"Model {run.model('500m')}, bf16; rows were doubled.\n\n" + table(
        ("what", "largest that fits, rows", "out of memory at", "searched up to",
         "seconds of the largest", "its peak in use, GiB", "its peak held, GiB"), rows,
    )  # fmt: skip


def _profile(values: Values, run: Run) -> str:
    measured = run.device != "cpu"
    parts = [f"Model {run.model('500m')}, bf16, under torch's profiler."]
    if not measured:
        parts[0] += f" On a CPU nothing is launched or copied: {NOTHING} is not measured."
    if "per_decoding_step" in values:
        rows = [(_counted(n), v if measured else None)
                for n, v in values["per_decoding_step"].items()]  # fmt: skip
        what = f"per decoding step (one token of each row), {values['rows']} rows"
        parts.append(table(("what", what), [(n, shown(v)) for n, v in rows]))
    for phase in ("rollout", "scoring", "optimisation"):
        if phase not in values:
            continue
        p = values[phase]
        counts = {"kernel_milliseconds": p["kernel_milliseconds"], **p["calls"]}
        rows = [("host ms", p["host_milliseconds"])]
        rows += [(_counted(n), v if measured else None) for n, v in counts.items()]
        parts += [f"### {phase}", table(("what", "whole phase"), rows)]
        for key, what in (("kernels", "costliest kernels"), ("host", "costliest host operations")):
            rows = [(f"`{e['name']}`", e["milliseconds"], e["count"]) for e in p[key]]
            if rows:
                parts.append(table((what, "ms", "calls"), rows))
    return "\n\n".join(parts)


def _counted(name: str) -> str:
    return "kernel ms" if name == "kernel_milliseconds" else name.replace("_", " ")


def _trl(values: Values, _: Run) -> str:
    rows = [
        (phase, values["trl"][phase]["median"], values["ours"][phase]["median"], ratio,
         values["trl"][phase]["reply_tokens_per_second"],
         values["ours"][phase]["reply_tokens_per_second"])
        for phase, ratio in values["ratio"].items()
    ]  # fmt: skip
    size = values["settings"]["workload"]["size"]
    memory = ", ".join(f"{s} {shown(m['peak'] / GIB)} GiB" for s, m in values["memory"].items())
    differences = ", ".join(f"{n} {shown(d)}" for n, d in values["differences"].items())
    tolerance = values["settings"].get("tolerance")
    return (
        f"{size['parameters'] / 1e6:.0f} M parameters, float32 on both sides, batch "
        f"{size['batch']}, mean reply {shown(values['mean_reply'])} tokens. The ratio is TRL's "
        "seconds over ours. "
        + (f"Peak memory: {memory}. " if memory else "")
        + f"Largest differences: {differences}"
        + (f" (tolerance {shown(tolerance)})" if tolerance is not None else "")
        + ".\n\n"
        + table(("phase", "TRL 1.12, s", "ours, s", "ratio", "TRL 1.12, reply tokens/s",
                 "ours, reply tokens/s"), rows)
    )  # fmt: skip


def _share(rate: float | None, run: Run, kind: str) -> str | None:
    if kind not in run.ceilings:
        return None
    percent = 100 * _number(rate) / _number(run.ceilings[kind])
    return f"{percent:.1f} %" if math.isfinite(percent) else shown(percent)


def _number(value: float | None, divisor: float = 1) -> float:
    """Return a number in a larger unit; null in gpu.json is one that is not finite."""
    return math.nan if value is None else value / divisor


def _memory(values: Values) -> tuple[Any, Any]:
    """Return peak memory used and held, in GiB.

    On a CPU the process's resident peak takes the place of the first.
    """
    if "peak_resident_mib" in values:
        return _number(values["peak_resident_mib"], GIB), None
    if "peak_allocated_mib" not in values:
        return None, None
    held = _number(values["peak_reserved_mib"], GIB)
    return _number(values["peak_allocated_mib"], GIB), held


RENDERERS: Mapping[str, Callable[[Values, Run], str]] = {
    "environment": _environment,
    "golden": _tests,
    "tests": _tests,
    "precision": _precision,
    "resume": _resume,
    "cache": _cache,
    "learning": _learning,
    "learning-bf16": _learning,
    "rates": _rates,
    "rollouts-500m": _rollouts,
    "rollouts-124m": _rollouts,
    "update-500m": _updates,
    "update-124m": _updates,
    "lora": _updates,
    "largest": _largest,
    "profile": _profile,
    "trl": _trl,
}
