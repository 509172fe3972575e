# SPDX-License-Identifier: Apache-2.0
"""The Nix expression evaluates, with what nixpkgs is asked for in its place."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from host.test_package import REPOSITORY
from infertune import __version__

EXPRESSION = REPOSITORY / "packaging" / "nix"
NIXPKGS = """
let names = list: builtins.listToAttrs (map (name: { inherit name; value = name; }) list);
in import EXPRESSION {
  pkgs = throw "asked for more of nixpkgs than stands in the head";
  lib = {
    cleanSource = toString;
    makeLibraryPath = builtins.concatStringsSep ":";
    makeSearchPathOutput = output: path: builtins.concatStringsSep ":";
    licenses = names [ "asl20" "gpl2Only" ];
  };
  python3Packages = names [ "hatchling" "bcrypt" "dbus-fast" "prometheus-client" "pyyaml" ]
    // { buildPythonApplication = given: given; };
  libbpf = "libbpf"; systemdLibs = "systemd"; clang = "clang"; llvm = "llvm";
  linuxHeaders = "headers";
}
"""


def test_it_evaluates_and_has_this_version_and_what_the_extras_need() -> None:
    if not shutil.which("nix-instantiate"):
        pytest.skip("nix-instantiate is not installed (Debian: nix-bin)")
    text = NIXPKGS.replace("EXPRESSION", str(EXPRESSION))
    words = ["nix-instantiate", "--eval", "--strict", "--json", "--readonly-mode", "-E", text]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["version"], made["src"]) == (__version__, str(REPOSITORY))
    assert set(made["dependencies"]) == {"bcrypt", "dbus-fast", "prometheus-client", "pyyaml"}
    assert made["makeWrapperArgs"][-1] == "libbpf:systemd"
    assert made["env"] == {"C_INCLUDE_PATH": "libbpf:headers"}
