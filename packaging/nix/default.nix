# SPDX-License-Identifier: Apache-2.0
# infertune from this checkout:  nix-build packaging/nix  or  pkgs.callPackage ./packaging/nix { }
{
  pkgs ? import <nixpkgs> { },
  lib ? pkgs.lib,
  python3Packages ? pkgs.python3Packages,
  libbpf ? pkgs.libbpf,
  systemdLibs ? pkgs.systemdLibs,
  clang ? pkgs.llvmPackages.clang-unwrapped,
  llvm ? pkgs.llvmPackages.llvm,
  linuxHeaders ? pkgs.linuxHeaders,
}:
let
  root = ../..;
  said = builtins.readFile (root + "/daemon/infertune/__init__.py");
  version = builtins.head (builtins.match ".*__version__ = \"([^\"]*)\".*" said);
in
python3Packages.buildPythonApplication {
  pname = "infertune";
  inherit version;
  pyproject = true;
  src = lib.cleanSource root;

  build-system = [ python3Packages.hatchling ];
  # The probes; without a compiler they are left out.
  nativeBuildInputs = [
    clang
    llvm
  ];
  # It has no wrapper, which would compile for another machine than BPF's.
  env.C_INCLUDE_PATH = lib.makeSearchPathOutput "dev" "include" [
    libbpf
    linuxHeaders
  ];

  # The extras daemon and exporter.
  dependencies = with python3Packages; [
    bcrypt
    dbus-fast
    prometheus-client
    pyyaml
  ];
  # Loaded by name: libbpf.so.1, libsystemd.so.0, libudev.so.1.
  makeWrapperArgs = [
    "--prefix"
    "LD_LIBRARY_PATH"
    ":"
    (lib.makeLibraryPath [
      libbpf
      systemdLibs
    ])
  ];

  doCheck = false; # the tests want the checkout and its .venv: scripts/test
  pythonImportsCheck = [
    "infertune"
    "infertune.service.start"
    "infertune.exporter.main"
  ];

  meta = {
    description = "Tuning of this machine for local LLM inference, with a way back";
    license = with lib.licenses; [
      asl20
      gpl2Only
    ];
    platforms = [ "x86_64-linux" ];
    mainProgram = "infertune";
  };
}
