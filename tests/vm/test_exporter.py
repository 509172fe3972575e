# SPDX-License-Identifier: Apache-2.0
"""infertune-exporter as its unit on stock kernels: who it is, what it sees, what it leaves."""

from __future__ import annotations

import json
import re

import pytest

from vm.guest import Guest
from vm.test_daemon import wait_until
from vm.test_serve import fake, pid_of, profile, serving  # noqa: F401 (a fixture)

pytestmark = pytest.mark.quick_on("6.12")

UNIT = "infertune-exporter.service"


def page(guest: Guest, words: str = "") -> str:
    url = f"http://127.0.0.1:9877/metrics{words}"
    fetch = f"import urllib.request as u; print(u.urlopen('{url}', timeout=60).read().decode())"
    return guest.sh(f'python3 -c "{fetch}"')


def value(text: str, name: str, **labels: str) -> float:
    """Of the one series with this name and at least these labels."""
    found = [
        line.rpartition(" ")[2]
        for line in text.splitlines()
        if re.match(rf"{name}[{{ ]", line)
        and all(f'{key}="{word}"' in line for key, word in labels.items())
    ]
    assert len(found) == 1, (name, labels, found)
    return float(found[0])


@pytest.fixture
def exporting(serving: Guest) -> Guest:  # noqa: F811
    serving.sh("systemctl start infertune-exporter.socket infertune-exporter.service")
    return serving


def test_the_unit_has_no_capability_and_counts_all_the_same(exporting: Guest) -> None:
    pid = exporting.sh(f"systemctl show -P MainPID {UNIT}").strip()
    facts = exporting.sh(f"cat /proc/{pid}/task/*/status")
    # The bounding set takes CAP_SETPCAP to empty; no program started here could use it.
    assert set(re.findall(r"NoNewPrivs:\s+(\d)", facts)) == {"1"}
    for kind in ("CapEff", "CapPrm", "CapAmb"):
        assert set(re.findall(rf"{kind}:\s+(\w+)", facts)) == {"0" * 16}
    assert set(re.findall(r"Uid:\s+(\d+)", facts)) != {"0"}
    score = exporting.sh(f"systemd-analyze security --no-pager {UNIT} | tail -n 1")
    exposure = float(re.findall(r"\d+\.\d", score)[0])
    assert exposure <= 1.5, score
    verify = exporting.run(f"systemd-analyze verify --man=no {UNIT} infertune-exporter.socket")
    assert (verify.code, verify.out, verify.err) == (0, "", "")
    states = {
        each["name"]: each for each in json.loads(exporting.sh("infertune probes --json"))["probes"]
    }
    for name in ("page_faults", "context_switches", "reclaim", "compaction"):
        assert states[name]["state"] == "attached", states
    first = page(exporting)
    again = page(exporting)
    assert 'infertune_collector_success{collector="memory"} 1' in first
    assert "infertune_probe_state" in again
    done = exporting.run(f"nsenter -t {pid} -a -S follow -G follow "
                         "sh -c 'echo 1 >/proc/sys/vm/swappiness'")  # fmt: skip
    assert done.code != 0


def test_a_server_is_seen_by_its_name(exporting: Guest) -> None:
    fake(exporting, "--hold-mib 100")  # no more than what is used is protected
    profile(
        exporting,
        "held",
        'description = "x"\n[now]\nvm.swappiness = 9\n[launch]\nmemory_min = "64MiB"\n',
    )
    exporting.infertune("serve held --model /opt/model.gguf --name chat")
    pid_of(exporting, "chat")
    wait_until(lambda: 'server="chat"' in page(exporting))
    text = page(exporting)
    held = value(text, "infertune_unit_memory_protected_bytes", server="chat", limit="min")
    assert held == 64 * 2**20
    assert value(text, "infertune_profile_info", profile="held") == 1
    exporting.infertune("stop chat")


def test_jobs_of_a_gpu_that_appears_later_are_counted(exporting: Guest) -> None:
    exporting.sh("modprobe mock_gpusched")
    try:
        wait_until(
            lambda: 'probe="drm_scheduler",state="attached"} 1' in page(exporting), seconds=120
        )
        exporting.sh("echo '40 2000 1' >/dev/mock_gpu; sleep 1")
        text = page(exporting)
        done = [
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("infertune_drm_scheduler_jobs_total")
            and "comp_1.0.0" in line
            and 'event="done"' in line
        ]
        assert sum(done) == 40, [line for line in text.splitlines() if "drm_scheduler" in line]
    finally:
        exporting.sh(f"systemctl stop infertune-exporter.socket {UNIT}")
        exporting.sh("rmmod mock_gpusched")
