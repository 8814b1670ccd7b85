"""gpu.json as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.pieces import PIECES


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: which pieces passed, and what was measured."""
    machine = results.get("environment", {}).get("numbers", {})
    lines = [
        "# Measured on a GPU",
        "",
        "Written by `make gpu` from gpu.json beside it; each piece can be run again by itself.",
        "",
        *_machine(machine),
        "| piece | what it shows | result | seconds | commit |",
        "|---|---|---|---|---|",
    ]
    for name, piece in PIECES.items():
        if name in results:
            result = results[name]
            found = ("passed" if result["passed"] else "**failed**") + _tests(result["numbers"] if piece.tests else {})
            lines.append(f"| {name} | {piece.text} | {found} | {result['seconds']:.0f} | {result['commit']} |")
    numbers = {name: result["numbers"].get(name, {}) for name, result in results.items()}
    lines += [*_recipes(numbers.get("recipes", {})), *_step(numbers.get("step", {}))]
    lines += _profile(numbers.get("profile", {}))
    for name, result in results.items():
        if not result["passed"]:
            lines += ["", f"## {name} failed", "", "```", *result["said"], "```"]
    return "\n".join(lines) + "\n"


def _machine(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    device = f"{found['gpu']}, {found['memory_bytes'] / 2**30:.0f} GiB" if found["gpu"] else "a CPU: small models only"
    named = [f"{name} {found[name]}" for name in ("python", "torch", "cuda", "nccl", "driver") if found[name]]
    others = [
        f"{name} {versions['installed'] or 'missing'} ({versions['pinned']} pinned)"
        for name, versions in found["packages"].items()
        if versions["installed"] != versions["pinned"]
    ]
    return [f"On {device}; {', '.join(named)}.", *([f"Not as pinned: {', '.join(others)}."] if others else []), ""]


def _tests(counts: Mapping[str, Any]) -> str:
    if not counts:
        return ""
    parts = {"passed": counts["passed"], "failed": len(counts["failed"]), "skipped": counts["skipped"]}
    return ": " + ", ".join(f"{number} {what}" for what, number in parts.items() if number)


def _recipes(recipes: Mapping[str, Any]) -> list[str]:
    if not recipes:
        return []
    lines = ["", "## Published recipes", "", "Whole batches on one device.", ""]
    lines += ["| recipe | tokens/s, median | lowest to highest | MFU | peak memory |", "|---|---|---|---|---|"]
    for name, found in recipes.items():
        if "error" in found:
            lines.append(f"| {name} | {found['error']} | | | |")
            continue
        rate, mfu, peak = found["tokens_per_second"], found["mfu"], found["peak_memory_bytes"]
        span = f"{rate['minimum']:,.0f} to {rate['maximum']:,.0f}"
        rest = f"{mfu:.1%}" if mfu else "", f"{peak / 2**30:.1f} GiB" if peak else ""
        lines.append(f"| {name} | {rate['median']:,.0f} | {span} | {rest[0]} | {rest[1]} |")
    return lines


def _step(step: Mapping[str, Any]) -> list[str]:
    if not step:
        return []
    lines = ["", "## Bank against projection", "", "A step's speed, bank over projection.", ""]
    lines += ["| optimizer | median | lowest to highest |", "|---|---|---|"]
    for optimizer, found in step.items():
        ratio = found["bank / projection"]["wall"]
        lines.append(f"| {optimizer} | {ratio['median']:.3f} | {ratio['minimum']:.3f} to {ratio['maximum']:.3f} |")
    return lines


def _profile(profile: Mapping[str, Any]) -> list[str]:
    if not profile:
        return []
    lines = [
        "",
        f"## A step of {profile['recipe']}",
        "",
        f"{profile['step_milliseconds']:.0f} ms, the device busy for {profile['busy_milliseconds']:.0f} of them, "
        f"{profile['launches']:,} launches.",
        "",
        "| kernel | ms | share | calls |",
        "|---|---|---|---|",
    ]
    return lines + [
        f"| `{row['name'][:90]}` | {row['milliseconds']:.2f} | {row['share']:.1%} | {row['calls']:,} |"
        for row in profile["kernels"]
    ]
