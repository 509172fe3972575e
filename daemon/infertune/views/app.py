# SPDX-License-Identifier: Apache-2.0
"""The screen of ``infertune top``: draws lines, maps keys.  The one module that needs textual.

A thread of its own reads, so that a driver or a server that hangs keeps no key from working.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from infertune.base.records import dataclass
from infertune.base.units import printable_line
from infertune.views.board import board

Document = Mapping[str, Any]

HELP = """\
a  apply a profile        r  revert: every original value back
c  confirm a trial        d  ask the doctor again
?  this help              q  quit

PROMPT/S, TOKENS/S   tokens a second while the server worked on prompts, on
                     answers.  In brackets: of an earlier request; an engine
                     that counts when a request ends has nothing newer.
TTFT                 time to the first token, the mean of the interval. <=:
                     the engine tells sums, so this is what all prompts that
                     ended took together, without waiting for their turn.
RUNQ P99             99 of 100 waits for a processor were no longer.
FAULTS/S             page faults that read from a disk or swap.
stalled              share of the time in which some work waited (PSI).
-                    not known.

Nothing here loads, wakes or keeps a model.       any key closes this help
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the screen is about."""

    look: Callable[[], Document]
    """The next document.  Raises nothing."""
    profiles: Callable[[], Sequence[str]]
    """Names of profiles that can be applied."""
    act: Callable[[Sequence[str]], str]
    """Carry out a verb; one line on what came of it.  Raises nothing."""
    ask_doctor: Callable[[], None]
    """Have the doctor asked at the next look."""
    why_not: str = ""
    """Why keys that change something do not work here; empty where they do."""


class Seen(Message):
    """There is a new document."""


class Told(Message):
    """Something was done, and this came of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class _Question(ModalScreen[bool]):
    """Asks once; only ``y`` is yes."""

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        yield Static(f"{self._question}\n\ny  yes      any other key  no", markup=False)

    def on_key(self, event: Any) -> None:
        event.stop()
        self.dismiss(event.key == "y")


class _Help(ModalScreen[None]):
    def compose(self) -> ComposeResult:
        yield Static(HELP, markup=False)

    def on_key(self, event: Any) -> None:
        event.stop()
        self.dismiss(None)


class _Profiles(ModalScreen[str | None]):
    """Choose one; that asks already, so nothing asks again."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "leave", "back")]

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = names

    def compose(self) -> ComposeResult:
        yield Static("apply which profile?  enter applies it, escape goes back", markup=False)
        yield OptionList(*(Option(each) for each in self._names), markup=False)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._names[event.option_index])

    def action_leave(self) -> None:
        self.dismiss(None)


class Top(App[None]):
    """The application."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { background: ansi_default; color: ansi_default; }
    #board { scrollbar-size-vertical: 1; height: 1fr; }
    #lines, #said { text-wrap: nowrap; text-overflow: ellipsis; }
    #said, #keys { dock: bottom; height: 1; }
    #said { margin-bottom: 1; }
    ModalScreen { align: center middle; background: ansi_default; }
    ModalScreen Static { width: 80; max-width: 100%; height: auto; padding: 0 1; }
    ModalScreen OptionList { width: 80; max-width: 100%; height: auto; max-height: 14;
      border: none; background: ansi_default; color: ansi_default; }
    OptionList > .option-list--option-highlighted { text-style: reverse; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", "quit"),
        Binding("a", "apply", "apply"),
        Binding("r", "revert", "revert"),
        Binding("c", "confirm", "confirm"),
        Binding("d", "doctor", "doctor"),
        Binding("question_mark,h", "help", "help"),
    ]
    KEYS = "a apply  r revert  c confirm  d doctor  ? help  q quit"

    def __init__(self, machine: Machine, every_s: float) -> None:
        super().__init__(ansi_color=True)
        self._machine = machine
        self._every_s = every_s
        self._over = threading.Event()
        self._again, self._drawn = threading.Event(), threading.Event()
        self._document: Document | None = None
        self._lines = Static("reading ...", id="lines", markup=False)
        self._said = Static("", id="said", markup=False)
        self._reader = threading.Thread(target=self._read, name="top", daemon=True)

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="board"):
            yield self._lines
        yield self._said
        yield Static(self.KEYS, id="keys", markup=False)

    def on_mount(self) -> None:
        self._reader.start()

    def on_unmount(self) -> None:
        self._over.set()
        for each in (self._drawn, self._again):
            each.set()

    def on_resize(self) -> None:
        self.draw()

    # -- what is seen --------------------------------------------------------------

    def _read(self) -> None:
        """Look, have it drawn, wait: what nobody has drawn yet is followed by nothing."""
        while True:
            self._document = self._machine.look()
            self._drawn.clear()
            if self._over.is_set():
                return
            self.post_message(Seen())
            self._drawn.wait()
            self._again.wait(self._every_s)
            self._again.clear()

    def on_seen(self) -> None:
        self.draw()
        self._drawn.set()

    def draw(self) -> None:
        """The document there is, on the terminal as it is now."""
        if self._document is not None and self._lines.is_attached:
            width = max(self.size.width - 1, 1)  # the last column is the scroll bar's
            lines = board(self._document, width)
            self._lines.update("\n".join(lines))

    def say(self, text: str) -> None:
        """One line above the keys."""
        if self._said.is_attached:
            self._said.update(printable_line(text, max(self.size.width - 1, 4)))

    def on_told(self, message: Told) -> None:
        self.say(message.text)

    # -- what keys do ----------------------------------------------------------------

    def action_help(self) -> None:
        self.push_screen(_Help())

    def action_doctor(self) -> None:
        self.say("asking the doctor ...")
        self._machine.ask_doctor()
        self._again.set()

    def action_apply(self) -> None:
        if self._may_act():
            self.push_screen(_Profiles(self._machine.profiles()), self._apply)

    def _apply(self, name: str | None) -> None:
        if name is not None:
            self._do("apply", name)

    def action_revert(self) -> None:
        self._ask("put every original value back?", "revert")

    def action_confirm(self) -> None:
        self._ask("keep what is on trial?", "confirm")

    def _ask(self, question: str, *words: str) -> None:
        def answered(yes: bool | None) -> None:
            if yes:
                self._do(*words)
            else:
                self.say("nothing was touched")

        if self._may_act():
            self.push_screen(_Question(question), answered)

    def _may_act(self) -> bool:
        if self._machine.why_not:
            self.say(self._machine.why_not)
        return not self._machine.why_not

    def _do(self, *words: str) -> None:
        self.say(f"{' '.join(words)} ...")

        def work() -> None:
            self.post_message(Told(self._machine.act(words)))
            self._again.set()

        threading.Thread(target=work, name="act", daemon=True).start()
