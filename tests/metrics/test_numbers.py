"""A number is one unit: written in whichever way, it is equal to itself, and to no part of it."""

from __future__ import annotations

import pytest

from lavis_lstp.metrics.choice import parse_choice
from lavis_lstp.metrics.numbers import counted
from lavis_lstp.metrics.qa import exact_match, normalise

WRITTEN = """
0.5 = .5 = 0.50 = 0,5 | 1.5 = 1,5 = 1,50 | 1000 = 1,000 = 1 000 = 1'000 = 1\u2019000 = 1\u2009000 = 1,000.00
1234.56 = 1,234.56 = 1.234,56 | 1000000 = 1,000,000 = 1.000.000 | 7 = 007 | -5 = \u22125 = \u2013 5 | +5
1/2 = \u00bd = 1 / 2 = \\frac{1}{2} | 2.5 = 2\u00bd = 2 1/2 | 10^2 = 10\u00b2 = 10^{2} | 2^3 = 2\u00b3 | m2 = m\u00b2
5% = 5 % = \uff15\uff05 | $5 = $ 5 | 5\u00b0c = 5 \u00b0C | 5 m = 5m | 5 pm = 5pm = 5 p.m. | 0:35 = 00:35 = 00:00:35
2-3 = 2\u20133 = 2 - 3 | 2:1 | 1.000 | 1,2,3 | 1.2.3 | 12.11.2026 | 2026-11-28
1980s | mp3s | v1.50 | 5th | 15 | 23 | 102
"""
SPOKEN = """
200 = two hundred = 2 hundred | 21 = twenty one = twenty-one | 105 = one hundred and five | 100 = a hundred
1900 = nineteen hundred | 1984 = nineteen eighty-four | 2026 = twenty twenty six = two thousand and twenty-six
1200000 = 1.2 million = one million two hundred thousand | 1.5 = one and a half | 2.5 = two and a half = two point five
2:30 = half past two = two thirty | 2:15 = quarter past two | 2:45 = a quarter to three | 2:10 = ten past two
2:00 = two o'clock | 5% = five percent = 5 per cent | 2/3 = two thirds | 3/4 = three quarters | 1/2 = one half
1st = first | 21st = twenty-first | 2-3 = two to three = 2 or 3 = between two and three | 1-2 = one or two
0:35-0:45 = 0:35 to 0:45 | 5-10 m = 5 m to 10 m | >2 = more than two | \u22655 = at least five = five or more
<10 = fewer than ten | -5 = minus five | 12 = a dozen | 24 = two dozen | 6 = half a dozen | 1-2-3 = one two three
1 time = once = one time | 2 times = twice = two times | 3 times = thrice | 1-2 times = once or twice
"""


def groups(table: str) -> list[list[str]]:
    return [group.strip(" ").split(" = ") for line in table.strip().split("\n") for group in line.split(" | ")]


def test_numbers_in_digits_are_equal_to_themselves_alone():
    same = [[form.replace("\u2013 ", "-") for form in group] for group in groups(WRITTEN)]
    for group in same:
        for form in group:
            assert {exact_match(group[0], form), exact_match(form, group[0])} == {1}, (group[0], form)
            assert {exact_match(other[0], form) for other in same if other is not group} == {0}, form


def test_numbers_in_words_are_those_in_digits():
    for number, *forms in groups(SPOKEN):
        assert {normalise(f"about {form}.", counted) for form in forms} == {f"about {number}"}
    assert normalise("Two hundred", counted) == "200" and normalise("Two hundred") == "two hundred"


@pytest.mark.parametrize(
    ("text", "options", "number"),
    [
        (".5", ["0.5", "5"], 0),
        ("10\u00b2", ["102", "100"], None),
        ("There are two hundred people.", ["2", "200", "20"], 1),
        ("She is twenty one years old.", ["20", "21"], 1),
        ("There are 10 000 seats.", ["10", "10,000", "100,000"], 1),
        ("10.000", ["10", "10,000"], None),
        ("It is 1,5 m long.", ["15 m", "1.5 m"], 1),
        ("two and a half", ["2", "2.5"], 1),
        ("three and a half", ["3", "2.5"], None),
        ("half past two", ["2", "2:30"], 1),
        ("two thirty", ["2", "30"], None),
        ("5 %", ["5", "5%"], 1),
        ("fifty percent", ["50", "50%"], 1),
        ("50%", ["50", "60"], None),
        ("from 0:35 to 0:45", ["0:35", "0:35 - 0:45"], 1),
        ("00:35", ["35", "0:35"], 1),
        ("From 0:02 to 0:05, 3 people appear.", ["2", "3", "5"], 1),
        ("28/11/2026", ["28", "11"], None),
        ("in the 1990s", ["1990", "2000"], None),
        ("nineteen eighty-four", ["19", "1984"], 1),
        ("the 2nd one", ["2", "3"], None),
        ("the 2nd one", ["first", "second"], 1),
        ("2-3", ["2", "4"], None),
        ("2 or 3 dogs", ["2 dogs", "4 dogs"], None),
        ("between 5 m and 10 m", ["5 m", "20 m"], None),
        ("more than three", ["3", "4"], None),
        ("more than three", ["3", "More than 3"], 1),
        (">10", ["9", "10"], None),
        ("nearly 10", ["9", "10"], None),
        ("about ten", ["9", "10"], 1),
        ("minus five", ["5", "-5"], 1),
        ("It costs $5.50", ["$5", "$5.50"], 1),
        ("5cm", ["5 m", "5 cm"], 1),
        ("two dozen", ["2", "12"], None),
        ("He jumps twice.", ["1", "2"], 1),
        ("Two times", ["Once", "Twice", "Three times"], 1),
        ("Only once, at the start.", ["1", "2"], 0),
        ("Once he jumps, all at once.", ["1", "2"], None),
        ("twice as many", ["1", "2"], None),
        ("once or twice", ["Once", "Twice"], None),
        ("one of the two leaves", ["1", "2"], None),
        ("4,6,14,15", ["4, 6, 14, 15", "4, 6, 14", "6, 14, 15", "4, 6"], 0),
        ("The order is 3,2,1.", ["1, 2, 3", "3, 2, 1", "2, 1, 3"], 1),
        ("3, 2, 1", ["1,2,3", "3,2,1", "2,1,3"], 1),
        ("1,000,000", ["1, 0, 0", "1000000", "1000"], 1),
        ("4 out of 5", ["5", "4/5"], 1),
        ("one hundred and one", ["1", "100", "101"], 2),
        ("There are 3 men and 2 women. The answer is 5.", ["2", "3", "5"], 2),
    ],
)
def test_an_option_is_a_whole_number_or_none(text, options, number):
    assert parse_choice(text, options) == number
