"""Renders gpu.md from gpu.json; what a section has not measured (yet) is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]
GIB = 1024


def markdown(result: Values) -> str:
    """The whole report."""
    sections: Values = result["sections"]
    parts = [_head(result), _overview(sections)]
    ceilings = _results(sections, "rates").get("matmul_gflops_per_second", {})
    for name, section in sections.items():
        values = section["results"]
        if not values or name not in RENDERERS:
            continue
        try:
            text = RENDERERS[name](values, ceilings)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            text = f"Incomplete ({type(error).__name__}: {error}); gpu.json has what there is."
        parts.append(f"## {name}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers are shortened."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(shown(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A cell: numbers with three digits, others as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).replace("|", "\\|").replace("\n", " ")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _results(sections: Values, name: str) -> Values:
    return sections.get(name, {}).get("results", {})


def _head(result: Values) -> str:
    environment = _results(result["sections"], "environment")
    gpu = environment.get("gpu") or "no GPU"
    packages = environment.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    size = "tiny sizes, for a test of the script" if result["tiny"] else "full sizes"
    return (
        f"# PPO on {gpu}\n\n{result['started']}, {result['seconds']:.0f} s, device "
        f"{result['device']}, {size}. Python {environment.get('python')}, {versions}; "
        f"{environment.get('cores')} cores. Packages missing: "
        f"{result['missing_packages'] or 'none'}. Archive: {result.get('archive')}."
    )


def _overview(sections: Values) -> str:
    rows = [(n, s["status"], s["seconds"], s["reason"]) for n, s in sections.items()]
    return table(("section", "status", "seconds", "why"), rows)


def _tests(values: Values, _: Values) -> str:
    counts = ", ".join(f"{values[n]} {n}" for n in ("passed", "failed", "errors", "skipped"))
    failures = "".join(f"\n- {failure}" for failure in values["failures"])
    return f"`pytest {' '.join(values['selection'])}`: {counts}.{failures}"


def _precision(values: Values, _: Values) -> str:
    rows = [
        (model, way, *(
            found[reference][error]
            for reference in ("against_float32_packed", "against_same_precision_packed")
            for error in ("largest_ratio_error", "mean_ratio_error")
        ))
        for model, ways in values.items() for way, found in ways.items()
    ]  # fmt: skip
    return "|ratio − 1| of a reply token's probability, same weights and tokens.\n\n" + table(
        ("model", "computed", "largest, against float32 packed", "mean", "largest, against the "
         "same precision packed", "mean"), rows,
    )  # fmt: skip


def _resume(values: Values, _: Values) -> str:
    rows = [
        (name, o["mode"], o["bit_equal"], o.get("undisturbed_runs_equal", ""), o["finding"],
         o["refused"] or "", "; ".join(o["nondeterministic"]))
        for name, o in values.items()
    ]  # fmt: skip
    return table(
        ("options / mode", "ran", "bit-equal", "two undisturbed runs equal", "difference",
         "refused by strict mode", "torch warned of"), rows,
    )  # fmt: skip


def _cache(values: Values, _: Values) -> str:
    rows = [
        (name, phase, *_memory(peaks), values[name]["seconds"][phase])
        for name in ("on", "off")
        for phase, peaks in values[name]["peaks"].items()
    ]
    equal = (
        f"Same replies: {values['same_replies']}; largest difference of a weight: "
        f"{shown(values['largest_weight_difference'])}."
    )
    header = ("optimize_device_cache", "phase", "peak in use, GiB", "peak held, GiB", "seconds")
    return equal + "\n\n" + table(header, rows)


def _learning(values: Values, _: Values) -> str:
    rows = [
        (name, values[name], ", ".join(map(shown, cpu)), values[f"{name}_within_cpu_seeds"])
        for name, cpu in values["cpu_seeds"].items()
    ]
    return (
        f"{values['precision']}, {values['updates']} updates in "
        f"{shown(values['seconds_training'])} s; reward model's accuracy "
        f"{shown(values['reward_model_accuracy'])}; gold {shown(values['gold_before'])} → "
        f"{shown(values['gold_after'])}; ended by an end token {shown(values['eos_rate'])}.\n\n"
        + table(("measure", "here", "seeds 0, 1, 2 on a CPU", "within them"), rows)
    )


def _rates(values: Values, _: Values) -> str:
    rows = [(name, rate / 1e3) for name, rate in values["matmul_gflops_per_second"].items()]
    n = values["matmul_shape"][0]
    text = table((f"product of {n} × {n} matrices", "TFLOP/s"), rows)
    if "copy_gb_per_second" in values:
        text += f"\n\nCopy on the device: {shown(values['copy_gb_per_second'])} GB/s, read + write."
    return text


def _rollouts(values: Values, ceilings: Values) -> str:
    rows = [
        (name, r["reply_tokens"], r["seconds"], r["reply_tokens_per_second"],
         r["steps_per_second"], r["gflops_per_second"] / 1e3,
         _share(r["gflops_per_second"], ceilings, "bf16"), *_memory(r))
        for name, r in values.items() if isinstance(r, dict)
    ]  # fmt: skip
    return f"{values['size']}, bf16. Geometric lengths are `varying`.\n\n" + table(
        ("lengths and rows", "reply tokens", "seconds", "reply tokens/s", "steps/s", "TFLOP/s",
         "of the matmul rate", "peak in use, GiB", "peak held, GiB"), rows,
    )  # fmt: skip


def _updates(values: Values, ceilings: Values) -> str:
    rows = [
        (name, phase, p["seconds"], p["tokens_per_second"], p["gflops_per_second"] / 1e3,
         _share(p["gflops_per_second"], ceilings, "fp32" if "fp32" in name else "bf16"),
         *_memory(p))
        for name, run in values.items() if isinstance(run, dict)
        for phase, p in run["phases"].items()
    ]  # fmt: skip
    return f"{values['size']}; tokens are those of prompts and replies.\n\n" + table(
        ("run", "phase", "seconds", "tokens/s", "TFLOP/s", "of the matmul rate",
         "peak in use, GiB", "peak held, GiB"), rows,
    )  # fmt: skip


def _largest(values: Values, _: Values) -> str:
    rows = []
    for name in ("decode", "micro_batch", "micro_batch_checkpointing"):
        found = values.get(name)
        if not found:
            continue
        rows += [(name, r["rows"], r["seconds"], *_memory(r)) for r in found["fitted"]]
        limit = found["out_of_memory_at"]
        rows.append((name, "out of memory at" if limit else "searched to",
                     limit or found["searched_to"], "", ""))  # fmt: skip
    return table(("what", "rows", "seconds", "peak in use, GiB", "peak held, GiB"), rows)


def _profile(values: Values, _: Values) -> str:
    parts = []
    if "per_decoded_token" in values:
        rows = [(n.replace("_", " "), v) for n, v in values["per_decoded_token"].items()]
        parts.append(table((f"per decoding step of {values['rows']} rows", ""), rows))
    for phase in ("rollout", "scoring", "optimisation"):
        if phase not in values:
            continue
        p = values[phase]
        calls = ", ".join(f"{n.replace('_', ' ')} {c:,}" for n, c in p["calls"].items())
        parts.append(
            f"### {phase}\n\nKernels {shown(p['kernel_milliseconds'])} ms, host "
            f"{shown(p['host_milliseconds'])} ms under the profiler; {calls}."
        )
        for what in ("kernels", "host"):
            rows = [(f"`{e['name']}`", e["milliseconds"], e["count"]) for e in p[what]]
            if rows:
                parts.append(table((what, "ms", "calls"), rows))
    return "\n\n".join(parts)


def _trl(values: Values, _: Values) -> str:
    rows = [
        (phase, values["trl"][phase]["median"], values["ours"][phase]["median"], ratio,
         values["trl"][phase]["reply_tokens_per_second"],
         values["ours"][phase]["reply_tokens_per_second"])
        for phase, ratio in values["ratio"].items()
    ]  # fmt: skip
    size = values["settings"]["workload"]["size"]
    memory = ", ".join(f"{s} {shown(m['peak'] / GIB)} GiB" for s, m in values["memory"].items())
    differences = ", ".join(f"{n} {shown(d)}" for n, d in values["differences"].items())
    return (
        f"{size['parameters'] / 1e6:.0f} M parameters, float32 on both sides, batch "
        f"{size['batch']}, mean reply {shown(values['mean_reply'])}. Peak memory: "
        f"{memory or 'not measured'}. Largest differences: {differences}.\n\n"
        + table(("phase", "TRL, seconds", "ours", "ratio", "TRL, reply tokens/s", "ours"), rows)
    )


def _share(rate: float, ceilings: Values, kind: str) -> str:
    return f"{rate / ceilings[kind]:.3f}" if kind in ceilings else ""


def _memory(values: Values) -> tuple[Any, Any]:
    """Peak in use and held, in GiB; on a CPU the process's resident set stands for the first."""
    if "peak_resident_mib" in values:
        return values["peak_resident_mib"] / GIB, ""
    return values["peak_allocated_mib"] / GIB, values["peak_reserved_mib"] / GIB


RENDERERS: Mapping[str, Callable[[Values, Values], str]] = {
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
