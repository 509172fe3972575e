# SPDX-License-Identifier: Apache-2.0
"""Words put into any text and taken out again: all that was there stays, in its order."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from infertune.boot import words
from infertune.boot.change import AT_THE_TRY

WORDS = ("ttm.pages_limit=25165824", "amd_iommu=off", "isolcpus=2-3")
PLACES = ("options", "cmdline", "line", "shell LINUX_OPTIONS", "limine default fallback")
NEAR = ("amd_iommu=offx", "xamd_iommu=off", "ttm.pages_limit=5", "root=UUID=1", "options", "#")

some = st.sampled_from(NEAR) | st.text("ab=.,\x7f\xe9\udcff", min_size=1, max_size=5)
gap = st.sampled_from((" ", "  ", "\t"))
lines = st.lists(st.tuples(some, gap).map("".join), max_size=4).map("".join)
begun = st.tuples(st.sampled_from(("", "options ", "options\t", "# ", "title ")), lines)
texts = st.tuples(
    st.lists(begun.map("".join), max_size=5).map("\n".join),
    st.sampled_from(("", "\n", "\r\n", "\n\n")),
).map("".join)


def blank(text: str) -> str:
    """But for blanks at the ends of lines, and the newline that a last line did not have."""
    return "\n".join(line.rstrip() for line in text.rstrip("\n").split("\n"))


@pytest.mark.parametrize("given_words", [WORDS, (*WORDS, *AT_THE_TRY)], ids=["lasting", "trial"])
@pytest.mark.parametrize("place", PLACES)
@given(text=texts)
def test_in_and_out_again(place: str, given_words: tuple[str, ...], text: str) -> None:
    added = words.add(place, text, given_words)
    assert words.add(place, added, given_words) == added
    removed = words.remove(place, added, given_words)
    assert not set(removed.split()) & set(given_words)
    if place in ("options", "cmdline", "line"):
        kept = [word for word in added.split() if word not in given_words]
        assert kept == text.split() or kept == [*text.split(), "options"]
        assume(kept == text.split() and text.strip())
    assert blank(removed).strip() == blank(text).strip()
