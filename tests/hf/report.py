"""Counts by outcome, and every skipped test with its reason. Copied to ``conftest.py`` beside transformers' tests."""

from __future__ import annotations

import re
from collections import defaultdict

#: Marks that transformers' own conftest.py declares, which its distribution leaves out.
MARKS = (
    "is_pipeline_test", "is_training_test", "is_tensor_parallel_test", "is_expert_parallel_test", "is_fsdp_test",
    "is_staging_test", "slow", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "all_flash_attn_test",
    "torch_compile_test", "torch_export_test", "generate", "not_device_test", "accelerate_tests", "agent_tests",
    "bitsandbytes", "huggingface_hub_integration",
)  # fmt: skip


def pytest_configure(config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: transformers'")


def pytest_terminal_summary(terminalreporter) -> None:
    outcomes = {name: terminalreporter.stats.get(name, []) for name in ("passed", "failed", "error", "skipped")}
    reasons = defaultdict(list)
    for report in outcomes["skipped"]:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = re.sub(r"^(Skipped: )?(\S+ is skipped: )?", "", reason.strip())
        reasons[reason].append(report.nodeid.split("::", 1)[1])
    terminalreporter.section("skipped, by reason")
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        terminalreporter.write_line(f"{len(names):4d}  {reason}")
        for name in sorted(set(names)):
            terminalreporter.write_line(f"      {name}")
    counts = ", ".join(f"{len(reports)} {name}" for name, reports in outcomes.items() if reports or name != "error")
    terminalreporter.section(counts)
