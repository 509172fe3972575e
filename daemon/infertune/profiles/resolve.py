# SPDX-License-Identifier: Apache-2.0
"""From a profile to what it means on one machine and one backend.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from infertune.base.errors import ProfileError, UsageError
from infertune.base.records import dataclass
from infertune.catalogue.backends import BACKENDS
from infertune.host.machine import Machine
from infertune.profiles.profile import CATALOGUE, Given, Profile, Section, Source, value_type


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting with its value on this machine, and where it comes from."""

    id: str
    configured: str | int | bool
    """As the profile says it: ``"85%"``."""
    canonical: str
    """As it is compared and written here: ``"26738688"``."""
    required: bool
    because: str | None
    source: Source
    overridden: tuple[tuple[Source, str | int | bool], ...]
    """What it won over, nearest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unresolved:
    """An optional setting that has no meaning on this machine."""

    id: str
    configured: str | int | bool
    reason: str
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """What a profile wants of this machine; settings are in the order of the catalogue."""

    profile: str
    backend: str
    now: tuple[Setting, ...]
    boot: tuple[Setting, ...]
    launch: Mapping[str, Setting]
    env: Mapping[str, Setting]
    server: Mapping[str, Setting]
    unresolved: tuple[Unresolved, ...]


def canonical(settings: Mapping[str, Setting]) -> dict[str, str]:
    """Settings as they are compared and written here, by id."""
    return {name: setting.canonical for name, setting in settings.items()}


def assume_backend(machine: Machine) -> tuple[str, str]:
    """The backend to expect before a server binary is known, and why.

    The launcher replaces it with what the binary really is.
    """
    if any(gpu.driver == "amdgpu" for gpu in machine.gpus):
        return "vulkan", "there is an amdgpu device; a ROCm server is known by its own devices"
    return "cpu", "there is no amdgpu device"


def resolve(profile: Profile, machine: Machine, backend: str = "auto") -> Desired:
    """What ``profile`` means on ``machine`` for ``backend`` (one of BACKENDS, or ``auto``).

    Shares become amounts and CPU sets become lists.  What cannot be resolved
    here (no L3 is known, less memory than the least amount) is left out and
    listed in ``unresolved``.  Raises ProfileError if such a setting is
    required, UsageError for an unknown backend.
    """
    if backend == "auto":
        backend, _ = assume_backend(machine)
    elif backend not in BACKENDS:
        import difflib

        close = difflib.get_close_matches(backend, BACKENDS, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else None
        raise UsageError(
            f"{backend!r} is not a backend; one of auto, {', '.join(BACKENDS)}", hint=hint
        )
    settings: dict[Section, list[Setting]] = {}
    unresolved: list[Unresolved] = []
    for given in _in_order(profile.by_backend[backend].values()):
        try:
            canonical = value_type(given.section, given.id).parse(given.configured, machine)
        except ValueError as error:
            source = given.source
            if given.required:
                raise ProfileError(
                    f"'{given.id}' is required, but not possible on this machine: {error}",
                    file=source.file,
                    line=source.line,
                ) from error
            unresolved.append(
                Unresolved(
                    id=given.id, configured=given.configured, reason=str(error), source=source
                )
            )
            continue
        settings.setdefault(given.section, []).append(
            Setting(
                id=given.id,
                configured=given.configured,
                canonical=canonical,
                required=given.required,
                because=given.because,
                source=given.source,
                overridden=given.overridden,
            )
        )
    return Desired(
        profile=profile.name,
        backend=backend,
        now=tuple(settings.get("now", ())),
        boot=tuple(settings.get("boot", ())),
        launch={setting.id: setting for setting in settings.get("launch", ())},
        env={setting.id: setting for setting in settings.get("env", ())},
        server={setting.id: setting for setting in settings.get("server", ())},
        unresolved=tuple(unresolved),
    )


def _in_order(settings: Iterable[Given]) -> list[Given]:
    """Sorted as in the catalogue; variables, which it does not list, by name."""
    return sorted(settings, key=lambda g: (_POSITION.get((g.section, g.id), 0), g.id))


_POSITION = {
    (section, name): number
    for section, names in CATALOGUE.items()
    for number, name in enumerate(names)
}
