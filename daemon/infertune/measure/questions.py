# SPDX-License-Identifier: Apache-2.0
"""What servers are asked to have their answers compared: beginnings to go on from, closed items.

Short, so that a slow machine gets through; of many kinds, since what a change does to an answer
depends on the text.  Made up for this purpose.
"""

from __future__ import annotations

from collections.abc import Sequence

PREFIXES: tuple[str, ...] = (
    "The lighthouse keeper climbed the stairs every evening because",
    "Bread rises because the yeast in the dough",
    "In the spring of 1912 the river",
    "A good way to find a fault in an electric circuit is to",
    "Dear Mrs Harding,\n\nThank you for your letter of 3 May. I am sorry to hear that",
    "Question: Why is the sky blue?\nAnswer:",
    "Q: Name three metals.\nA: Iron, copper and",
    "Monday, Tuesday, Wednesday,",
    "1, 1, 2, 3, 5, 8,",
    "def area_of_circle(radius):\n    return",
    "#include <stdio.h>\n\nint main(void)\n{\n    for (int i = 0; i < 10; i++)\n",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2020 GROUP BY name ORDER BY",
    '{"name": "Ada", "age": 36}\n{"name": "Ben", "age": 41}\n{"name": "Cleo", "age":',
    "# Shopping list\n\n- apples\n- bread\n-",
    "<ul>\n  <li>One</li>\n  <li>Two</li>\n  <li>",
    'for file in *.txt; do\n    mv "$file"',
    "Der Zug nach Hamburg hat heute",
    "La capitale de la France est",
    "English: good morning\nSpanish: buenos días\nEnglish: thank you\nSpanish:",
    "The opposite of hot is cold. The opposite of early is late. The opposite of heavy is",
    "Once there was a fox who wanted to cross a river. He asked the otter,",
    "The patient was given 5 mg of the drug twice a day. After a week",
    "To be counted as a mammal, an animal must",
    "x = 3\ny = x * 2\nz = y + 1\nprint(z)  # prints",
)
"""Of 5 to 50 tokens each."""

UNSEEN: tuple[str, ...] = (
    "The clock in the station had stopped, so the passengers",
    "Glass is made by heating sand until",
    "In the winter of 1874 the village",
    "The first thing to do when a bicycle chain comes off is to",
    "Dear Mr Lowe,\n\nI am writing to ask whether the hall is free on",
    "Question: What do bees eat?\nAnswer:",
    "January, February, March,",
    "2, 4, 8, 16,",
    "def is_even(number):\n    return",
    "public class Main {\n    public static void main(String[] args) {\n        System.out.",
    "Rot, gelb, grün und",
    "The opposite of up is down. The opposite of open is closed. The opposite of full is",
)
"""For the last check of what was found with the others."""

_SUMS = ((2, 5), (4, 4), (7, 2), (6, 3), (1, 8), (5, 3), (3, 4), (2, 6), (9, 1), (4, 5))
_WORDS = (
    *("stone", "river", "candle", "window", "orange"),
    *("ladder", "pepper", "garden", "silver", "market"),
)
_PEOPLE = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack")
_AGES = (31, 47, 25, 62, 19, 54, 38, 73, 28, 66)


def _sum(first: int, second: int) -> tuple[str, str]:
    return f"1 + 1 = 2\n3 + 2 = 5\n6 + 1 = 7\n{first} + {second} =", str(first + second)


def _copy(word: str) -> tuple[str, str]:
    return f"Say it again.\ntable: table\nforest: forest\n{word}:", word


def _look_up(at: int) -> tuple[str, str]:
    people = [(_PEOPLE[(at + each) % 10], _AGES[(at + each) % 10]) for each in range(4)]
    name, age = people[at % 4]
    told = "\n".join(f"{each} is {years} years old." for each, years in people)
    return f"{told}\n{name} is", f"{age}"


def _json(at: int) -> tuple[str, str]:
    name, age, word = _PEOPLE[at], _AGES[at], _WORDS[at]
    shown = '{"name": "Lea", "age": 50, "likes": "bread"}\nname=Lea likes=bread age=50'
    asked = f'{{"name": "{name}", "age": {age}, "likes": "{word}"}}\nname={name} likes={word} age='
    return f"{shown}\n{asked}", f"{age}"


ITEMS: Sequence[tuple[str, str]] = (
    *(_sum(first, second) for first, second in _SUMS),
    *map(_copy, _WORDS),
    *map(_look_up, range(10)),
    *map(_json, range(10)),
)
"""Forty closed items, each with the one right answer: sums, copying, looking up, JSON."""
