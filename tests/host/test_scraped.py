# SPDX-License-Identifier: Apache-2.0
"""A Prometheus as Debian's package configures it, after the role: it scrapes a real exporter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from host.test_dashboards import ENVIRONMENT, REPOSITORY, Prometheus, free_port, get, until

pytestmark = pytest.mark.timeout(600)

STOCK = """global:
  scrape_interval:     1s # Set the scrape interval.
alerting:
  alertmanagers:
  - static_configs:
    - targets: ['127.0.0.1:9']
# Load rules once and periodically evaluate them.
rule_files:
  # - "first_rules.yml"

scrape_configs:
  - job_name: 'prometheus'
    static_configs:
      - targets: ['127.0.0.1:{own}']
"""


def play(directory: Path, port: int) -> None:
    """The playbook for one machine, which is monitored and monitors itself."""
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "ansible_become": False,
        "monitoring_prometheus": str(directory),
        "monitoring_grafana": "",
        "monitoring_port": port,
        "monitoring_reload": False,
    }
    machine = {"hosts": {"here": variables}}
    inventory = directory / "inventory.json"
    inventory.write_text(json.dumps({"infertune": machine, "monitoring": machine}))
    environment = {**os.environ, "ANSIBLE_HOME": str(directory / "home"), "ANSIBLE_NOCOLOR": "1"}
    words = ["ansible-playbook", "-i", inventory, "playbooks/monitoring.yml"]
    done = subprocess.run(
        words, cwd=REPOSITORY / "ansible", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_plain_prometheus_scrapes_after_the_play(tmp_path: Path) -> None:
    if lacking := [
        tool for tool in ("ansible-playbook", "prometheus", "promtool") if not shutil.which(tool)
    ]:
        pytest.skip(f"not installed: {', '.join(lacking)}")
    own, port = free_port(), free_port()
    (tmp_path / "prometheus.yml").write_text(STOCK.format(own=own))
    play(tmp_path, port)
    exporter = [sys.executable, "-B", "-m", "infertune.exporter.main"]
    prometheus = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}"]
    prometheus += [f"--storage.tsdb.path={tmp_path / 'data'}", "--log.level=error"]
    prometheus += [f"--web.listen-address=127.0.0.1:{own}"]
    with (
        subprocess.Popen([*exporter, "--listen", f"127.0.0.1:{port}"], env=ENVIRONMENT) as one,
        subprocess.Popen(prometheus, cwd=tmp_path, stderr=subprocess.DEVNULL) as two,
    ):
        try:
            asked = Prometheus(own)
            assert until(lambda: get(own, "/-/ready")[0] == 200, 120)
            up = f'up{{job="infertune", instance="here:{port}"}} == 1'
            assert until(lambda: bool(asked.query(up)), 120)
            assert asked.query("infertune_collector_success")
            assert asked.query('up{job="prometheus"}')
            groups = asked.ask("rules")["groups"]
            assert {Path(each["file"]).name for each in groups} == {
                "infertune-alerts.yml",
                "infertune-records.yml",
            }
        finally:
            one.terminate()
            two.terminate()
