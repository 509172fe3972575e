# SPDX-License-Identifier: Apache-2.0
"""The rules: one file for each subject, one entry for each rule, and nothing else to touch."""

from infertune.doctor.base import Rule
from infertune.doctor.rules import (
    boot,
    driver,
    firmware,
    kernel,
    llama_cpp,
    logs,
    memory,
    runtime,
    servers,
    survey,
    swap,
    tuners,
    vulkan,
)

SUBJECTS: dict[str, tuple[Rule, ...]] = {
    "kernel": kernel.RULES,
    "firmware": firmware.RULES,
    "driver": driver.RULES,
    "runtime": runtime.RULES,
    "llama.cpp": llama_cpp.RULES,
    "servers": servers.RULES,
    "vulkan": vulkan.RULES,
    "memory": memory.RULES,
    "swap": swap.RULES,
    "boot": boot.RULES,
    "tuners": tuners.RULES,
    "logs": logs.RULES,
    "survey": survey.RULES,
}

RULES: dict[str, Rule] = {rule.id: rule for rules in SUBJECTS.values() for rule in rules}
