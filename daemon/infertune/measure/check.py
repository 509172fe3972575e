# SPDX-License-Identifier: Apache-2.0
"""The last phase of a search (tune.py): what was proposed, looked at by who believes none of it.

It reads three files and nothing of the search: the profile, the evidence, the baseline's reference.
Whether their seals hold is the least of it: who edits can seal anew.  A new reference is asked
prompts that the search never had; the gate must show that it can refuse (a planted error); the
proposal must pass it again; and it must be faster in fresh pairs, by rule S (statistics.py).  A tie
keeps the baseline.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

from infertune.base.errors import Failed, UsageError
from infertune.base.records import asdict, dataclass
from infertune.base.root import Root
from infertune.catalogue.server_settings import change_numbers
from infertune.measure import answers
from infertune.measure.arm import Arm, Starter
from infertune.measure.compare import judge, lay
from infertune.measure.kept import made_of
from infertune.measure.pairs import Comparison, Found, Runner
from infertune.measure.questions import PREFIXES, UNSEEN
from infertune.measure.space import Candidate, Configured, canonical
from infertune.measure.statistics import HELPS, LOOKS
from infertune.measure.store import Store
from infertune.measure.tune import (
    CHECK_SHARE,
    FIGURE,
    Job,
    Log,
    Timer,
    job_of,
    read_document,
    read_ground,
    why,
)

PROFILE, EVIDENCE, REFERENCE = "proposed.toml", "evidence.json", "reference.json"
SCHEMA = "infertune.evidence/1"
PLANTED: tuple[Configured, ...] = (
    {"rope_freq_scale": "0.9"},
    {"cache_type_k": "q4_0", "cache_type_v": "q4_0"},
)
"""What the gate must refuse; the first that the server takes."""
_ASKED = (*UNSEEN, *PREFIXES[: len(PREFIXES) - len(UNSEEN)])


@dataclass(frozen=True, slots=True)
class Proposal:
    """What the search proposes, as it stands on disk."""

    job: Job
    candidate: Candidate
    evidence: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of the check."""

    accepted: bool
    word: str
    """Of the fresh pairs: one of statistics.py's; or ``refused`` where they were not asked."""
    why: str
    found: Found | None = None


def evidence_of(
    job: Job, candidate: Candidate, profile: str, reference: str, steps: Mapping[str, Any]
) -> dict[str, Any]:
    """What is sealed with a proposal."""
    return answers.seal(
        {
            "schema": SCHEMA,
            "job": asdict(job),
            "candidate": dict(candidate.settings),
            "profile_sha256": hashlib.sha256(profile.encode()).hexdigest(),
            "reference_sha256": reference,
            "steps": steps,
        }
    )


def read_proposal(root: Root, directory: str) -> Proposal:
    """The proposal of a run.  Raises UsageError where its files do not belong together."""
    evidence = read_document(root, f"{directory}/{EVIDENCE}")
    answers.check_seal(evidence)
    try:
        if evidence["schema"] != SCHEMA:
            raise ValueError
        job = job_of(evidence["job"])
        candidate = made_of(Candidate, {"settings": evidence["candidate"]})
        wanted = canonical({**job.baseline, **candidate.settings})
        profile_sha256, reference_sha256 = evidence["profile_sha256"], evidence["reference_sha256"]
    except (KeyError, ValueError):
        raise UsageError(f"{directory}/{EVIDENCE} is not a document of {SCHEMA}") from None
    text = read_profile(root, directory)
    if hashlib.sha256(text.encode()).hexdigest() != profile_sha256:
        raise UsageError(f"{directory}/{PROFILE} was changed after it was proposed")
    try:
        told = canonical(tomllib.loads(text)["server"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(f"{directory}/{PROFILE} is no profile of a server") from None
    if told != wanted:
        raise UsageError(f"{directory}/{PROFILE} does not say what was tried")
    read_ground(root, f"{directory}/{REFERENCE}", job.arm)
    reference = read_document(root, f"{directory}/{REFERENCE}")
    if reference["sha256"] != reference_sha256:
        raise UsageError(f"{directory}/{REFERENCE} is not the one that the search used")
    return Proposal(job, candidate, evidence)


def read_profile(root: Root, directory: str) -> str:
    """The text of the proposed profile.  Raises UsageError."""
    try:
        return root.read_file(f"{directory}/{PROFILE}", 64 * 1024)[0].decode()
    except (OSError, ValueError):
        raise UsageError(f"{directory}/{PROFILE} is not there, or is no text") from None


@dataclass(slots=True)
class Checker:
    """Checks one proposal."""

    starter: Starter
    timer: Timer
    proposal: Proposal
    log: Log
    say: Callable[[str], None]
    time_left: Callable[[float], bool]

    def run(self) -> Checked:
        """The verdict.  Raises Failed where the gate cannot show that it works."""
        if refused := self._gate():
            return Checked(False, "refused", refused)
        found = self._pairs()
        word = found.verdict.word
        return Checked(word == HELPS, word, found.reason or "", found)

    def _gate(self) -> str | None:
        """Why the answers refuse the proposal; None where they do not."""
        job, candidate = self.proposal.job, self.proposal.candidate

        def work() -> Mapping[str, Any]:
            self.say("7 check: a new reference, with prompts that the search did not have")
            ground = lay(self.starter.serve, job.arm, self._aside, _ASKED, again=1)
            for planted in PLANTED:
                name = Candidate(planted).name
                self.say(f"7 check: a planted error, {name}, which must be refused")
                try:
                    trap = Arm(job.model, canonical({**job.baseline, **planted}))
                    outcome = judge(self.starter.serve, ground, trap, numbers=True, say=self._aside)
                except UsageError as error:
                    self._aside(error.message)
                    continue
                ground = outcome.ground
                self._aside(why(outcome))
                if outcome.accepted or not outcome.decided:
                    return _failed(f"the gate did not refuse {name}: it proves nothing here")
                break
            else:
                return _failed("no error could be planted: the gate was not seen to refuse")
            self.say(f"7 check: {candidate.name}")
            numbers = change_numbers(candidate.settings)
            outcome = judge(
                self.starter.serve, ground, job.with_(candidate), numbers=numbers, say=self._aside
            )
            self._aside(why(outcome))
            return {"failed": None, "refused": None if outcome.accepted else why(outcome)}

        found = self.log.step("7 check", work)
        if found["failed"]:
            raise Failed(found["failed"], hint="the baseline is kept")
        refused: str | None = found["refused"]
        return refused

    def _pairs(self) -> Found:
        """Fresh pairs: none that the search has measured is among them."""
        job = self.proposal.job
        self.say("7 check: fresh pairs against the baseline")
        tuned = job.with_(self.proposal.candidate)
        self.timer.arms |= {"baseline": job.arm, "tuned": tuned}
        runner = Runner(
            f"{job.seed}/check", self.timer.take, self.log.keep, self.log.samples, job.busy
        )
        comparison = Comparison("check", ("baseline", "tuned"), most=LOOKS[-1], figure=FIGURE)
        return runner.run(comparison, lambda: self.time_left(CHECK_SHARE))

    def _aside(self, text: str) -> None:
        self.say(f"  {text}")


def _failed(why_not: str) -> Mapping[str, Any]:
    return {"failed": why_not, "refused": None}


def open_log(root: Root, directory: str) -> Log:
    """The log of a run, with what is in it."""
    log = Log(Store(root, directory))
    log.read()
    return log
