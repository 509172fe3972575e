# SPDX-License-Identifier: Apache-2.0
"""The GPU's driver: is there one, is it the right one, and may the caller use it."""

from __future__ import annotations

from infertune.doctor.base import (
    Answer,
    Finding,
    Rule,
    Source,
    Unknown,
    github,
    kernel_doc,
    need,
    rocm,
)
from infertune.doctor.conditions import ALWAYS, AMDGPU, INTEGRATED, STRIX_HALO
from infertune.doctor.facts import Facts

_DKMS = {"amdttm", "amd_ttm"}


def _undriven(facts: Facts) -> Answer:
    devices = need(facts.undriven_gpus)
    if not devices:
        return None
    return Finding(f"{', '.join(devices)}: an AMD GPU without a driver, so models run on the CPU")


def _no_modeset(facts: Facts) -> Answer:
    if facts.parameter("nomodeset") is None:
        return None
    return Finding("nomodeset is on the command line: the GPU's driver does not start")


def _no_kfd(facts: Facts) -> Answer:
    if facts.machine.kfd:
        return None
    return Finding("amdgpu is loaded and KFD is not there: ROCm cannot run, Vulkan can")


def _wrong_ttm(facts: Facts) -> Answer:
    ttm = facts.machine.ttm
    if ttm is None:
        return Unknown("no TTM module of amdgpu's was found")
    wrong = [
        option
        for option in need(facts.options)
        if option.module in {"ttm", *_DKMS} and option.module != ttm.module
    ]
    right = [option for option in need(facts.options) if option.module == ttm.module]
    names = {option.name for option in right}
    missed = [option for option in wrong if option.name not in names]
    if not missed:
        return None
    said = ", ".join(f"{option} ({option.origin})" for option in missed)
    text = f"{said} has no effect: amdgpu uses the module {ttm.module}"
    return Finding(
        text,
        confidence="sure" if ttm.sure else "likely",
        fix=f"set {', '.join(f'{ttm.module}.{option.name}' for option in missed)} instead",
    )


def _dkms(facts: Facts) -> Answer:
    loaded = need(facts.modules) & _DKMS
    if not loaded:
        return None
    return Finding(f"{', '.join(sorted(loaded))}: the GPU runs on amdgpu-dkms")


def _forbidden(facts: Facts) -> Answer:
    devices = need(facts.devices)
    closed = [node for node, usable in devices.items() if not usable]
    if not devices:
        return Unknown("there is no GPU device node here")
    if not closed:
        return None
    return Finding(f"you may not use {', '.join(closed)}: the GPU is invisible to your programs")


def _several(facts: Facts) -> Answer:
    gpu = facts.gpu
    others = [each for each in facts.machine.gpus if each is not gpu and each.driver]
    if not others:
        return None
    names = ", ".join(f"{each.pci_id or '?'} ({each.driver})" for each in others)
    return Finding(f"beside the integrated GPU there is {names}: a server may spread over both")


RULES: tuple[Rule, ...] = (
    Rule(
        id="gpu-without-driver",
        title="an AMD GPU on the bus has no driver",
        when=ALWAYS,
        check=_undriven,
        severity="error",
        confidence="sure",
        fix="load amdgpu (modprobe amdgpu), and see the kernel log for why it did not start",
        sources=(kernel_doc("gpu/amdgpu/index"),),
    ),
    Rule(
        id="gpu-nomodeset",
        title="nomodeset keeps the GPU's driver from starting",
        when=ALWAYS,
        check=_no_modeset,
        severity="error",
        confidence="sure",
        fix="take nomodeset off the kernel command line",
        sources=(kernel_doc("admin-guide/kernel-parameters"),),
    ),
    Rule(
        id="gpu-without-kfd",
        title="amdgpu without KFD: no ROCm",
        when=AMDGPU,
        check=_no_kfd,
        severity="info",
        confidence="sure",
        fix="use a kernel with CONFIG_HSA_AMD, or Vulkan",
        sources=(
            Source(
                "ROCm prerequisites",
                "https://rocm.docs.amd.com/projects/install-on-linux/en/latest/",
            ),
        ),
    ),
    Rule(
        id="ttm-wrong-module",
        title="a GPU memory size is set on a TTM module the driver does not use",
        when=AMDGPU,
        check=_wrong_ttm,
        severity="error",
        confidence="sure",
        fix="set it on the module amdgpu holds (infertune machine shows it)",
        sources=(rocm(5562), rocm(5595)),
    ),
    Rule(
        id="driver-dkms",
        title="amdgpu-dkms on Strix Halo, where AMD supports the kernel's own driver",
        when=STRIX_HALO,
        check=_dkms,
        severity="warning",
        confidence="likely",
        fix="remove amdgpu-dkms and use the distribution's kernel; sizes then belong to ttm",
        sources=(rocm(5562),),
    ),
    Rule(
        id="gpu-not-permitted",
        title="the caller may not open the GPU's device nodes",
        when=AMDGPU,
        check=_forbidden,
        severity="warning",
        confidence="sure",
        fix="join the groups that own them (usermod -aG render,video NAME), and log in again",
        sources=(
            Source(
                "ROCm post-installation",
                "https://rocm.docs.amd.com/projects/install-on-linux/en/latest/install/prerequisites.html",
            ),
        ),
    ),
    Rule(
        id="gpu-several",
        title="a second GPU beside the integrated one",
        when=INTEGRATED,
        check=_several,
        severity="info",
        confidence="likely",
        fix="choose one: --device of llama-server, or HIP_VISIBLE_DEVICES and "
        "GGML_VK_VISIBLE_DEVICES",
        sources=(github("ggml-org/llama.cpp", 23977),),
    ),
)
