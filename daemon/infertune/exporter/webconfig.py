# SPDX-License-Identifier: Apache-2.0
"""TLS and basic authentication, by the web-config.yml that admins of Prometheus know.

The subset of exporter-toolkit's format that is named here; a key that is not is refused, since one
that is silently ignored would be a door left open.
"""

from __future__ import annotations

import hmac
import os
import re
import ssl
from collections.abc import Mapping

from infertune.base.errors import UsageError
from infertune.base.records import dataclass, field
from infertune.base.root import read_user_file

_TLS = ("cert_file", "key_file", "client_ca_file", "client_auth_type", "min_version")
_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_MAX_BYTES = 64 * 1024
# Version, cost from 4 to 31, 22 characters of salt and 31 of hash: crypt(5).
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}")


@dataclass(frozen=True)
class WebConfig:
    """How the port is protected."""

    tls: ssl.SSLContext | None = None
    users: Mapping[str, bytes] = field(default_factory=dict)
    """bcrypt hash by user name."""

    @property
    def client_certificates(self) -> bool:
        """Whether a client must show a certificate."""
        return self.tls is not None and self.tls.verify_mode is ssl.CERT_REQUIRED

    @property
    def open(self) -> bool:
        """Whether it asks nobody for anything."""
        return self.tls is None and not self.users

    @property
    def protected(self) -> bool:
        """Whether it may listen where others can reach it."""
        return self.tls is not None and (bool(self.users) or self.client_certificates)


def load(path: str) -> WebConfig:
    """Read the file.  Raises UsageError with the file and what would be right."""
    import yaml  # only where there is such a file

    try:
        text = read_user_file(path, _MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise UsageError(f"{path}: larger than 64 KiB; a web-config.yml has a few lines")
        found = yaml.safe_load(text) or {}
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply; it has tables of tables, no more") from error
    except (yaml.YAMLError, ValueError) as error:  # also a date or a number that is none
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    keys = _table(path, "the file", found, ("tls_server_config", "basic_auth_users"))
    tls = keys.get("tls_server_config")
    users = keys.get("basic_auth_users") or {}
    return WebConfig(_tls(path, tls) if tls is not None else None, _users(path, users))


def _table(path: str, where: str, found: object, known: tuple[str, ...]) -> Mapping[str, object]:
    if not isinstance(found, dict):
        raise UsageError(f"{path}: {where} is not a table of keys")
    for key in found:
        if known and key not in known:
            raise UsageError(
                f"{path}: unknown key {_shown(key)} in {where}",
                hint=f"known here: {', '.join(known)}",
            )
    return found


def _shown(found: object) -> str:
    """What somebody wrote, on one line."""
    text = " ".join(str(found).split())
    return f"'{text[:60]}{'...' if len(text) > 60 else ''}'"


def _tls(path: str, found: object) -> ssl.SSLContext:
    values = _table(path, "tls_server_config", found, _TLS)
    for key, value in values.items():
        if not isinstance(value, str):
            raise UsageError(f"{path}: {key} is not a text")
        if not value.isprintable():  # NUL is in no path; what else is here was not meant
            raise UsageError(
                f"{path}: {key} {value!a} has a character that cannot be printed",
                hint="cert_file, key_file and client_ca_file are paths of PEM files",
            )
    texts = {key: str(value) for key, value in values.items()}
    for key in ("cert_file", "key_file"):
        if key not in texts:
            raise UsageError(f"{path}: tls_server_config has no {key}")
    directory = os.path.dirname(os.path.abspath(path))
    files = {k: os.path.join(directory, v) for k, v in texts.items() if k.endswith("_file")}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    version = texts.get("min_version", "TLS12")
    if version not in _VERSIONS:
        raise UsageError(f"{path}: min_version {_shown(version)}; known: {', '.join(_VERSIONS)}")
    context.minimum_version = _VERSIONS[version]
    kind = texts.get("client_auth_type", "NoClientCert")
    if kind not in ("NoClientCert", "RequireAndVerifyClientCert"):
        raise UsageError(
            f"{path}: client_auth_type {_shown(kind)}",
            hint="NoClientCert, or RequireAndVerifyClientCert: the others do not protect",
        )
    if kind == "NoClientCert" and "client_ca_file" in files:
        raise UsageError(
            f"{path}: client_ca_file has no effect without client_auth_type",
            hint="client_auth_type: RequireAndVerifyClientCert",
        )
    try:
        context.load_cert_chain(files["cert_file"], files["key_file"])
        if kind == "RequireAndVerifyClientCert":
            if "client_ca_file" not in files:
                raise UsageError(f"{path}: {kind} needs a client_ca_file")
            context.load_verify_locations(files["client_ca_file"])
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise UsageError(
            f"{path}: TLS: {error.strerror or error}",
            hint="cert_file, key_file and client_ca_file are paths of PEM files",
        ) from error
    return context


def _users(path: str, found: object) -> dict[str, bytes]:
    users = {}
    for name, secret in _table(path, "basic_auth_users", found, ()).items():
        if not isinstance(secret, str) or not _BCRYPT.fullmatch(secret):
            raise UsageError(
                f"{path}: the password of {_shown(name)} is not a bcrypt hash",
                hint="make one with: htpasswd -nBC 10 ''",
            )
        users[str(name)] = secret.encode()
    return users


class Gate:
    """Checks passwords.  What was right once is remembered: bcrypt is slow on purpose."""

    def __init__(self, users: Mapping[str, bytes]) -> None:
        self._users = users
        self._slowest = max(users.values(), key=_cost)
        self._key = os.urandom(32)
        self._right: set[bytes] = set()

    def admits(self, user: str, password: str) -> bool:
        import bcrypt  # only where there are users

        proof = hmac.digest(self._key, f"{user}\0{password}".encode(), "sha256")
        if proof in self._right:
            return True
        known = self._users.get(user)
        against = known or self._slowest
        try:
            right = bcrypt.checkpw(password.encode()[:72], against) and known is not None
        except ValueError:
            return False
        if right:
            self._right.add(proof)
            return True
        # Whoever is refused has waited for 2^slowest rounds, whether there is such a user or not.
        for cost in range(_cost(against), _cost(self._slowest)):
            bcrypt.hashpw(b"", b"$2b$%02d$" % cost + b"." * 22)
        return False


def _cost(hashed: bytes) -> int:
    """A hash takes 2 to the power of this rounds."""
    return int(hashed[4:6])
