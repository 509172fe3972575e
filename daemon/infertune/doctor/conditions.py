# SPDX-License-Identifier: Apache-2.0
"""On which machines a rule says anything: one entry for each condition that rules share."""

from __future__ import annotations

from infertune.doctor.base import When, need
from infertune.doctor.facts import Facts
from infertune.host.machine import Gpu


def _gpu(facts: Facts) -> Gpu | None:
    return facts.machine.inference_gpu


def _amdgpu(facts: Facts) -> bool:
    gpu = _gpu(facts)
    return gpu is not None and gpu.driver == "amdgpu"


def _integrated(facts: Facts) -> bool:
    gpu = _gpu(facts)
    return gpu is not None and gpu.driver == "amdgpu" and gpu.integrated is True


def _strix_halo(facts: Facts) -> bool:
    gpu = _gpu(facts)
    return gpu is not None and (gpu.gfx_target == "gfx1151" or gpu.pci_id == "1002:1586")


def _rdna35(facts: Facts) -> bool:
    gpu = _gpu(facts)
    return _strix_halo(facts) or (gpu is not None and (gpu.gfx_target or "").startswith("gfx115"))


def _rocm_server(facts: Facts) -> bool:
    return facts.server is not None and "rocm" in need(facts.llama).backends


AMDGPU = When("an AMD GPU to run models on", _amdgpu)
INTEGRATED = When("an integrated AMD GPU", _integrated)
STRIX_HALO = When("Strix Halo (gfx1151)", _strix_halo)
RDNA35 = When("an integrated RDNA 3.5 GPU (gfx115x)", _rdna35)
SERVER = When("a llama-server on the search path", lambda facts: facts.server is not None)
ROCM_SERVER = When("a llama-server with ROCm", _rocm_server)
ROCM = When("ROCm is installed", lambda facts: need(facts.rocm) is not None)
NPU = When("an XDNA NPU", lambda facts: need(facts.npu_device))
DECLARED = When("a declared server", lambda facts: bool(need(facts.declared)))
SMOKED = When("asked for with --smoke", lambda facts: facts.smoke is not None)
