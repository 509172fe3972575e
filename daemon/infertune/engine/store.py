# SPDX-License-Identifier: Apache-2.0
"""Writing the journal and its lasting copy."""

from __future__ import annotations

import errno
import os

from infertune.base.root import Root
from infertune.engine.journal import (
    MAX_BYTES,
    PERSISTENT,
    RUNTIME,
    Journal,
    Loaded,
    dump,
    load,
    read_file,
    set_aside,
)


class Store:
    """One journal file, read once: whoever has the machine's lock is the only one to write it."""

    def __init__(self, root: Root, path: str) -> None:
        self._root = root
        self._known: Loaded | None = None
        self.path = path

    def load(self) -> Loaded:
        """What it holds.  Raises OSError only where the file exists and cannot be read."""
        if self._known is None:
            self._known = read_file(self._root, self.path)
        return self._known

    def save(self, journal: Journal, *, durable: bool = True) -> None:
        """Replace the file (see Root.replace).  Raises OSError; the old content is then there."""
        data = dump(journal)
        if len(data) > MAX_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), self.path)
        self._known = None  # if it fails half-way
        self._root.mkdir(self.path.rpartition("/")[0])
        self._root.replace(self.path, data, durable=durable)
        self._known = Loaded(journal)

    def remove(self) -> None:
        self._known = None
        self._root.unlink(self.path)

    def quarantine(self, usable: Journal | None) -> str:
        """Keep a damaged file, or what is in its place, for a person to look at; returns its path.

        The journal itself then holds what is usable of it, or is gone.
        """
        taken = set_aside(self._root, self.path)
        aside = next(
            path for n in range(1, 10_000) if (path := f"{self.path}.damaged-{n}") not in taken
        )
        self._known = None
        try:
            data = self._root.read_bytes(self.path)
        except IsADirectoryError:
            self._root.rename(self.path, aside)
            return aside
        self._root.replace(aside, data[:MAX_BYTES])
        if usable is None:
            self.remove()
        else:
            self.save(usable)
        return aside


class Journals:
    """The journal and its lasting copy as one.

    The copy is written before the journal and removed before it: where both can be read, the
    journal is right, and a copy alone means that the journal was lost.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self.runtime = Store(root, RUNTIME)
        self.persistent = Store(root, PERSISTENT)

    def load(self) -> Loaded:
        """What is in force in this boot.  Raises OSError; the copy is read only where it counts."""
        stores = {store.path: store for store in (self.runtime, self.persistent)}
        return load(self._root, lambda path: stores[path].load())

    def save(self, journal: Journal, *, durable: bool = True) -> None:
        """Write both.  Raises OSError; the journal is then what it was.

        ``durable``: a power cut brings no earlier copy back.
        """
        self.persistent.save(journal, durable=durable)
        # A power cut ends the boot, and a journal of another boot means nothing.
        self.runtime.save(journal, durable=False)

    def remove(self) -> None:
        """Forget both.  Raises OSError; the journal is gone all the same if it can be."""
        try:
            self.persistent.remove()
        finally:
            self.runtime.remove()

    def agree(self, journal: Journal) -> None:
        """Write ``journal`` where it is not.  Raises OSError.

        A place was lost, an apply that had nothing to change was killed between the two, or an
        earlier version kept less in the copy.
        """
        for store in (self.persistent, self.runtime):
            found = store.load()
            if found.journal != journal and not found.damage:  # that is set aside first
                store.save(journal)
