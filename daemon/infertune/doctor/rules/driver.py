# SPDX-License-Identifier: Apache-2.0
"""The GPU's driver: is there one, is it the right one, and may the caller use it."""

from __future__ import annotations

from collections.abc import Mapping

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
from infertune.doctor.conditions import AMDGPU, INTEGRATED, STRIX_HALO
from infertune.doctor.facts import Facts
from infertune.doctor.surroundings import LlamaServer
from infertune.host.nodes import Node

_DKMS = {"amdttm", "amd_ttm"}


def _undriven(facts: Facts) -> Answer:
    devices = need(facts.undriven_gpus)
    if not devices:
        return None
    return Finding(f"no driver is bound to the AMD GPU {', '.join(devices)}: models run on the CPU")


def _no_modeset(facts: Facts) -> Answer:
    if facts.parameter("nomodeset") is None:
        return None
    return Finding("nomodeset is on the command line: the GPU's driver does not load")


def _no_kfd(facts: Facts) -> Answer:
    if facts.machine.kfd:
        return None
    return Finding("amdgpu is loaded without KFD: ROCm cannot run, Vulkan can")


def _wrong_ttm(facts: Facts) -> Answer:
    ttm = facts.machine.ttm
    if ttm is None:
        return Unknown("no TTM module that amdgpu uses was found")
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
        fix="write "
        + ", ".join(f"{ttm.module}.{option.name}={option.value}" for option in missed)
        + " instead",
        about=f"{missed[-1].module}.{missed[-1].name}",
    )


def _dkms(facts: Facts) -> Answer:
    loaded = facts.loaded & _DKMS
    if not loaded:
        return None
    return Finding(f"{' and '.join(sorted(loaded))} is loaded: the GPU runs on amdgpu-dkms")


def _forbidden(facts: Facts) -> Answer:
    nodes = need(facts.devices)
    container = need(facts.container)
    closed = {path: node for path, node in nodes.items() if not node.usable}
    if not closed:
        return _absent(facts, nodes, container)
    said = ", ".join(
        f"{path} ({node.owners or 'owner not known'})" for path, node in closed.items()
    )
    return Finding(
        f"you may not open {said}: your programs cannot see the GPU",
        fix=_opening(next(iter(closed.values())), container),
    )


def _needs_kfd(facts: Facts) -> bool:
    """Whether anything here is known to want ROCm; not where all of it computes with Vulkan."""
    server = facts.server
    return not (isinstance(server, LlamaServer) and set(server.backends) <= {"vulkan", "cpu"})


def _absent(facts: Facts, nodes: Mapping[str, Node], container: str | None) -> Answer:
    """A container has the nodes that were passed into it."""
    kfd, render = "/dev/kfd" in nodes, any(path.startswith("/dev/dri/") for path in nodes)
    if container is None:
        return None if nodes else Unknown("there is no GPU device node here")
    if kfd and render:
        return None
    if render:
        if not _needs_kfd(facts):
            return None
        text = "there is no /dev/kfd in this container: ROCm cannot run in it, Vulkan can"
        return Finding(text, "info", fix=_passing(container))
    which = "/dev/dri/renderD*" if kfd else "/dev/kfd and no /dev/dri/renderD*"
    text = f"there is no {which} in this container: programs in it cannot use the GPU"
    return Finding(text, fix=_passing(container))


def _passing(container: str | None) -> str:
    """How a device gets into a container."""
    if container == "lxc":
        return "pass them through on the host (Proxmox: dev0: /dev/kfd, dev1: /dev/dri/renderD128)"
    return f"start the {container} container with --device /dev/kfd --device /dev/dri"


_HOST_SIDE = {
    "lxc": "set its group on the host (Proxmox: dev0: /dev/kfd,gid=NUMBER, of the group render in "
    "the container), or with a unit in the container that runs 'chgrp render /dev/kfd' at boot",
    "podman": "start the container with --group-add keep-groups, as a user who is in the node's "
    "group on the host",
    "docker": "start the container with --group-add NUMBER of the node's group on the host",
    "toolbox": "join the node's group on the host (usermod -aG render,video NAME), and log in "
    "again: toolbox keeps your groups",
}


def _opening(node: Node, container: str | None) -> str | None:
    """What opens a node to the caller; None: what the rule says."""
    if container is not None:
        other = "set its group and mode on the host, where the container gets the node from"
        return _HOST_SIDE.get(container, other)
    if not node.owners:
        return None
    if (node.mode or 0) & 0o002:
        return (
            "its mode lets everybody open it, so something else refuses: DeviceAllow= of the unit, "
            "a device rule of the control group, or SELinux (see the audit log)"
        )
    if node.group in ("root", "0") or not (node.mode or 0) & 0o020:
        return (
            'no group helps; a udev rule does: KERNEL=="kfd", GROUP="render", MODE="0660" '
            '(SUBSYSTEM=="drm", KERNEL=="renderD*" for the render node)'
        )
    return f"join the group {node.group} (usermod -aG {node.group} NAME), and log in again"


def _several(facts: Facts) -> Answer:
    gpu = facts.gpu
    others = [each for each in facts.machine.gpus if each is not gpu and each.driver]
    if not others:
        return None
    names = ", ".join(f"{each.pci_id or '?'} ({each.driver})" for each in others)
    return Finding(f"there is another GPU, {names}: a server may split a model across both")


RULES: tuple[Rule, ...] = (
    Rule(
        id="gpu-without-driver",
        title="an AMD GPU on the bus has no driver",
        check=_undriven,
        severity="error",
        confidence="sure",
        fix="load it (modprobe amdgpu), and see the kernel log for why it did not load",
        sources=(kernel_doc("gpu/amdgpu/index"),),
    ),
    Rule(
        id="gpu-nomodeset",
        title="nomodeset keeps the GPU's driver from loading",
        check=_no_modeset,
        severity="error",
        confidence="sure",
        fix="remove nomodeset from the kernel command line",
        sources=(
            kernel_doc("admin-guide/kernel-parameters"),
            github("kyuz0/amd-strix-halo-toolboxes", 75),
        ),
        covers=("gpu-without-driver", "gpu-without-kfd"),
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
        fix="set it on the module amdgpu uses ('infertune machine' shows it)",
        sources=(rocm(5562), rocm(5595)),
        covers=("option-not-in-force", "ttm-default"),
    ),
    Rule(
        id="driver-dkms",
        title="amdgpu-dkms on Strix Halo, where AMD supports the in-kernel driver",
        when=STRIX_HALO,
        check=_dkms,
        fix="remove amdgpu-dkms and use the distribution's kernel; sizes then belong to ttm",
        sources=(rocm(5562),),
    ),
    Rule(
        id="gpu-not-permitted",
        title="the GPU's device nodes are missing, or the caller may not open them",
        when=AMDGPU,
        check=_forbidden,
        confidence="sure",
        fix="join the groups that own them (usermod -aG render,video NAME), and log in again",
        sources=(
            Source(
                "ROCm post-installation",
                "https://rocm.docs.amd.com/projects/install-on-linux/en/latest/install/prerequisites.html",
            ),
            github("Hal0ai/hal0", 420),
        ),
    ),
    Rule(
        id="gpu-several",
        title="a second GPU beside the integrated one",
        when=INTEGRATED,
        check=_several,
        severity="info",
        fix="choose one: --device of llama-server, or HIP_VISIBLE_DEVICES and "
        "GGML_VK_VISIBLE_DEVICES",
        sources=(github("ggml-org/llama.cpp", 23977),),
    ),
)
