"""Answers as video language models write them: one option in any of their forms is read, two are not."""

from __future__ import annotations

import pytest

from lavis_lstp.metrics.choice import LETTERS, choice_prompt, parse_choice, without_labels
from lavis_lstp.metrics.qa import yes_or_no

OPTIONS = ["a dog", "a person", "a car"]


def forms(text: str) -> list[str]:
    return [form.replace("⏎", "\n") for line in text.strip().splitlines() for form in line.split(" | ")]


WRAPPERS = forms(r"""
@ | @. | (@) | [@] | "@" | **@** | __@__ | `@` | - @ | > @ | @</s> | @<|im_end|> | ✅ @ | @ 😊 | {"answer": "@"}
{'answer': '@'} | {"answer": @} | {"final_answer": "@",} | {"choice": ["@"]}
```json⏎{⏎  "reason": "It is there.",⏎  "answer": "@"⏎}⏎``` | Here it is: {"Answer": "@", "explanation": "The
{"answer": {"letter": "@", "sure": true}} | {"reason": "so", "selected_option": "@"} | \boxed{@} | \boxed{\text{@}}
$\boxed{@}$ | \[\boxed{\mathrm{@}}\] | \boxed{(@)} | $$\boxed{\textbf{@}}$$ | The final answer is: $\boxed{@}$.
\textbf{@} | <answer>@</answer> | <think>A? (B)? C?</think><answer>@ | <CONCLUSION> @ </CONCLUSION>
◁think▷A or B◁/think▷@ | <|begin_of_box|>@<|end_of_box|> | <final_answer>@</final_answer> | Final answer: @
**Answer:** @ | **Answer**: **@** | ### Final Answer⏎@ | Answer:⏎⏎@ | ASSISTANT: @ | The answer is @.
The correct answer is: @⏎⏎The video shows it. | So the answer is "@". | My answer is (@) | I think it's @
I'd say @ | Therefore, @. | In the video it is so. So the answer is @.
答案是@ | 答案：@。 | 所以答案是@
""")
SENTENCES = forms(r"""
I'd go with @. | I'd go with option @ because it fits. | I choose @ | I select (@) | I pick @ | I'm going with @.
Option @ is correct | @ is the correct answer. | (@) is right. | @ is the most likely. | @ best describes the video.
Option @ | option (@). | Choice: @ | Best option: (@) | Ans: @ | answer = @ | Answer -> @ | @, because it fits.
The answer should be @ | The correct choice would be (@). | The answer to the question is @ | It must be @.
The answer is clearly @! | Probably @. | The answer would most likely be @. | This best matches option @.
选@ | 应选@。 | 正确答案是@选项 | @是正确答案 | 【@】
La respuesta correcta es @. | Die richtige Antwort ist @. | La réponse est @.
정답: @ | It's @, not # | @, not #. | @ and not # | It's not #, it's @ | The answer is not #. It is @.
It is @ rather than #. | # is wrong, so the answer is @ | Option # is incorrect. Option @ is correct.
I don't think it's #. It's @. | Between # and @, I'd go with @. | I'd go with @ over #.
正解は@です。
We can rule out #, so @ is right. | # cannot be right, so it must be @ | The answer is @. Option # does not fit.
""")
"""@ is said; # is weighed or denied."""
TWO = forms(r"""
@ or # | (@) or (#) | @ and # | @/# | @, # | @ & # | Both @ and # are correct | @⏎# | Option @ and option #
The answer is @ or # | The answer is @, no, # | The answer is @. Or maybe #. | It could be @ or #.
@ is correct. # is correct. | I think it's @, but it could be # | The answer is @. The answer is #.
If it's @, then so, otherwise # | Option @ fits, option # fits as well.
答案是@或# | 答案是@还是# | 选@和#
{"answer": ["@", "#"]} | {"answer": "@ or #"} | {"answer": "@", "choice": "#"} | \boxed{@} \boxed{#} | \boxed{@, #}
<answer>@</answer> or <answer>#</answer> | Neither @ nor #
""")


@pytest.mark.parametrize("form", [*WRAPPERS, *SENTENCES])
def test_an_answer_that_names_one_option_is_read_as_it(form):
    for number, option in enumerate(OPTIONS):
        other = (number + 1) % 3
        letter = form.replace("@", LETTERS[number]).replace("#", LETTERS[other])
        assert parse_choice(letter, OPTIONS) == number, letter
        wide = form.replace("@", chr(ord("\uff21") + number)).replace("#", LETTERS[other])
        assert parse_choice(wide, OPTIONS) == number, wide
        if form in WRAPPERS:
            both = form.replace("@", f"{LETTERS[number]}. {option}")
            assert parse_choice(both, OPTIONS) == number, both


@pytest.mark.parametrize("form", TWO)
def test_an_answer_that_names_two_options_is_unparsable(form):
    for number in range(3):
        for other in {0, 1, 2} - {number}:
            text = form.replace("@", LETTERS[number]).replace("#", LETTERS[other])
            assert parse_choice(text, OPTIONS) is None, text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is a person, not a dog.", 1),
        ("a person rather than a dog", 1),
        ("The answer is (B) a person, not (A) a dog.", 1),
        ("The answer is B. The person walks a dog.", 1),
        ("B. A person\n\nExplanation: The dog is not shown, and there is no car.", 1),
        ("B. a person. The dog and the car are far away.", 1),
        ("A. a dog\nB. a person\nC. a car\n\nAnswer: B", 1),
        ("- A. a dog: none is seen.\n- B. a person: one walks.\n- C. a car: no car.\n\nTherefore, the answer is B.", 1),
        ("The answer is (B) a dog", None),
        ("A. a dog\nB. a person\nC. a car", None),
        # the words of one, and the letter of another
        ("It looks like a dog, but the closest is B.", None),
        ("It looks like a dog, but if I must choose: B", None),
        ("A dog. If forced, B.", None),
        ("The closest is B.", 1),
        ("If I must choose: B", 1),
        ("a dog is wrong.", None),
        ("a dog: incorrect", None),
        # letters that are words, or stand for nothing
        ("The answer is A cat", None),
        ("A cat sits", None),
        ("I think", None),
        ("Vitamin C", None),
        ("B-roll footage", None),
        ("B's house", None),
        ("He got a B in class", None),
        ("It's a B movie", None),
        ("The options are A, B and C.", None),
        ("The answer is E", None),
        ('{"answer": 2}', None),
        ('{"answer": null}', None),
        (r"\boxed{}", None),
        # denied, asked
        ("Option B is wrong.", None),
        ("Not B", None),
        ("I don't think it's B", None),
        ("B is not correct", None),
        ("B isn't right.", None),
        *(
            (f"Answer: B {out}", None)
            for out in ("ruled out", "excluded", "rejected", "is out", "fails", "is a distractor")
        ),
        *((f"Option B {out}, leaving C", 2) for out in ("discarded", "dismissed", "eliminated")),
        *((f"{doubt} B.", None) for doubt in ("The answer is not going to be", "The answer is unlikely to be")),
        *((f"{doubt} B.", None) for doubt in ("I doubt it is", "Nobody would say the answer is")),
        ("B cannot be the answer", None),
        ("no person", None),
        ("B?", None),
        ("Is it B?", None),
        ("\u7b54\u6848\u4e0d\u662fB", None),
    ],
)
def test_words_around_a_letter_are_read_and_nothing_is_guessed(text, number):
    assert parse_choice(text, OPTIONS) == number


VEHICLES = ["a red car", "a blue bus", "a green bike", "a yellow truck"]
LISTED = "A. a red car - not visible\nB. a blue bus - visible throughout\nC. a green bike - not visible"


@pytest.mark.parametrize(
    "text",
    [
        f"Let's look at each option:\n{LISTED}\n\nSo the answer is B.",
        f"Let's look at each option:\n{LISTED}\n\nAnswer: B",
        f"Let's go through the options:\n{LISTED}\n\n**B**",
        f"Let's check the options:\n{LISTED}\n\nFinal Answer: a blue bus",
        f"**B. a blue bus**\n\nHere is each option:\n{LISTED}",
        f"The answer is B.\n\n{LISTED}",
        "Let's analyze each option:\n\n### A. a red car\nNo.\n\n### B. a blue bus\nYes.\n\n### So\nThe answer is B.",
        "Option A: a red car. Not visible.\nOption B: a blue bus. Visible.\nAnswer: B",
        "A) a red car - incorrect\nB) a blue bus - correct\nC) a green bike - incorrect",
        "A) a red car \u274c\nB) a blue bus \u2705\nC) a green bike \u274c",
        "A red car is parked at the start. The answer is B.",
        "The answer is B. A red car is only seen in the background.",
        "The correct answer is B. Here's why: option A shows a red car, which is not in the clip. Option B is correct "
        "because the bus is blue.",
        "The answer is B because option A (a red car) is never seen.",
        "Correct answer is B, since the red car doesn't appear.",
        "The answer: B\n\nReason: a red car is never seen.",
        "**B. a blue bus**\n\nThe red car is parked, not moving.",
        "B. A blue bus passes. A red car is behind it.",
        "I see a red car first. The correct answer is a blue bus.",
        "Of all the options, B fits best.",
        "After considering all options, the answer is a blue bus.",
        "After analyzing each option, B is the correct answer.",
        "Not A, but B",
        "Ans. B",
        "B (confidence: high)",
        "A blue bus (B)",
        "It's not A but B.",
        "Choose the correct option: B",
        "The answer that best matches the video is B.",
    ],
)
def test_an_outright_answer_decides_beside_options_that_are_weighed(text):
    assert parse_choice(text, VEHICLES) == 1


@pytest.mark.parametrize(
    "text",
    [
        f"Let's look at each option:\n{LISTED}",
        "Let's analyze each option:\n\nA. The car is not in the clip.\nB. The bus passes at",
        "To find the correct answer, let's look at each option:\n\n**A. a red car:** The video does not",
        "To find the best answer we check each option: A. a red car",
        "Let's evaluate each option:\n\nA) a red car - the video",
        "Let me consider each choice:\nA. The car",
        "Let's go through the options:\n\n* **A. a red car**: not shown",
        "Looking at the options:\n- A: a red car is not shown\n- B: a blue bus",
        "Let's look at each option:\n- a red car\n",
        "To determine the correct answer, we need to analyze the video:\nA. a red car - not shown",
        "The correct answer could be one of the following:\nA. a red car",
        "We are asked which is right: A. a red car",
        "First, consider option A: a red car is",
        "Let's start with option A: a red car. The",
        "Option A is a red car. The video",
        "Option A: a red car. Not visible.\nOption B: a blue",
        "If the answer is A, the car",
        "For the answer to be A, a red car must be visible",
        "Someone might think A",
        "The answer is B, a red car.",
        "A red car (B)",
        f"B. a blue bus\n\nHere is each option:\n{LISTED}\nSo the answer is A.",
        "The answer is A. Wait, actually the answer is B.",
        "The answer is A. A red car is seen. The answer is B.",
    ],
)
def test_options_that_are_weighed_and_cut_off_name_none(text):
    assert parse_choice(text, VEHICLES) is None


COLOURS, ANIMALS, DEEDS = ["red", "blue", "green", "yellow"], ["a dog", "a cat", "a horse"], ["walk", "run", "sit"]
COUNTS, ORDER = ["1", "2", "3", "4"], ["before", "after", "at the same time"]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("The car is not red or blue.", COLOURS),
        ("The car isn't red or blue.", COLOURS),
        ("It's not blue or green.", COLOURS),
        ("It isn't a dog or a cat.", ANIMALS),
        ("The man did not walk or run.", DEEDS),
        ("None of the cars are red.", COLOURS),
        ("None of the people wear green.", COLOURS),
        ("Nobody wears blue.", COLOURS),
        ("Nothing in the video is blue.", COLOURS),
        ("There is hardly any green.", COLOURS),
        ("The man is without a dog", ANIMALS),
        ("No one is wearing red.", COLOURS),
        ("The wrong answer is A.", COLOURS),
        ("The incorrect option is C.", COLOURS),
        ("The least likely option is A.", COLOURS),
        ("The worst choice is D.", COLOURS),
        ("The only option that is not shown is B.", COLOURS),
        ("The least plausible answer would be C.", COLOURS),
        ("The option that doesn't match is (B).", COLOURS),
        ("In frame 2, the man jumps.", COUNTS),
        ("Frame 3 shows the man jumping.", COUNTS),
        ("Sorry, I can only see frame 1.", COUNTS),
        ("In the first 3 seconds of the video, several people walk.", COUNTS),
        ("The video is 4 seconds long.", COUNTS),
        ("At 2 seconds a man appears.", COUNTS),
        ("At 0:02 a man appears.", COUNTS),
        ("After analyzing the frames, the door is closed.", ORDER),
        ("Before the end, he leaves.", ORDER),
        ("It is unclear if the car is red.", COLOURS),
        ("It is hard to say whether the man feeds a dog.", ANIMALS),
        ("I cannot tell whether it is blue.", COLOURS),
        ("It is unclear whether the answer is B.", COLOURS),
        ("I am not sure if it is B.", COLOURS),
        ("I can't tell if it's A", COLOURS),
        ("It's hard to tell whether the answer is A or B", COLOURS),
        ("It is not only red but blue", COLOURS),
        ("Nobody would say B.", COLOURS),
        ("The answer is hardly B.", COLOURS),
        ("Hardly red.", COLOURS),
        ("The car is anything but red.", COLOURS),
        ("The car lacks red paint", COLOURS),
        ("red is missing", COLOURS),
        ("There is no red car", COLOURS),
        ("Everything except red", COLOURS),
        ("every color except for red", COLOURS),
        ("other than red", COLOURS),
        ("B seems unlikely", COLOURS),
        ("B would be wrong", COLOURS),
        ("B is least likely", COLOURS),
        ("B is the least likely", COLOURS),
        ("B is the wrong answer", COLOURS),
        ("B is the worst option", COLOURS),
        ("B: incorrect", COLOURS),
        ("Option B is not supported.", COLOURS),
        ("(B) is a distractor", COLOURS),
        ("None of the options (A, B, C, D) is correct.", COLOURS),
        ("No option (A, B, C, or D) best describes the video.", COLOURS),
        ("I cannot say which of the options (A), (B), (C), (D) is right.", COLOURS),
        ("I don't know whether A, B, C or D is right.", COLOURS),
        ("One of A, B, C, D is correct.", COLOURS),
        ("He used to run but now sits", DEEDS),
        ("He refuses to sit.", DEEDS),
        ("run (A)", DEEDS),
        ("You're right.", ["left", "right"]),
        ("the third one", COUNTS),
        ("See chapter 3.", COUNTS),
        ("B is the only option that is not shown.", COLOURS),
        ("Only B is wrong", COLOURS),
        ("B (not visible)", COLOURS),
        ("Although A seems right, it is not correct.", COLOURS),
        ("I can't tell, but A or B", COLOURS),
        ("A - no\nB - yes\nC - no\nD - no", COLOURS),
        ("Option analysis:\nA. red - shown.\nB. blue - not shown.", COLOURS),
        ("Answer: C. Blue", COLOURS),
        ("The answer is C. Blue", COLOURS),
        ("The answer is A. No", ["yes", "no"]),
        ("Yes, B.", ["yes", "no"]),
        ("No, A", ["yes", "no"]),
        ("Is it red?", COLOURS),
        ("Suppose it is red.", COLOURS),
        ("All but red.", COLOURS),
        ("Red can be ruled out.", COLOURS),
        ("B is hardly correct", COLOURS),
        ("B is anything but correct.", COLOURS),
        ("Option B contradicts the video.", COLOURS),
        ("A. Wrong", COLOURS),
        ("A: no red is seen", COLOURS),
        ("Answer: B; C", COLOURS),
        ("The answer is B as well as C.", COLOURS),
        ("It's tempting to choose B.", COLOURS),
        ("\u4e0d\u9009B", COLOURS),
        ("I believe C is preparing food.", ["C is cooking a meal", "C is reading", "C is cleaning", "C sings"]),
        ("It's not clear, but it's neither red nor blue", COLOURS),
    ],
)
def test_a_sentence_that_says_something_else_of_an_option_names_none(text, options):
    """Denied in a list, by nobody, unclear, the wrong one; a count of frames or seconds; a clause in front."""
    assert parse_choice(text, options) is None


@pytest.mark.parametrize(
    ("text", "options", "number"),
    [
        ("It's not red or blue but green.", COLOURS, 2),
        ("Not a dog or a cat, but a horse.", ANIMALS, 2),
        ("The wrong answer is A. The right answer is B.", COLOURS, 1),
        ("The least likely option is A, so the answer is B.", COLOURS, 1),
        ("There are 3 people.", COUNTS, 2),
        ("The man jumps 4 times in the video.", COUNTS, 3),
        ("He leaves before the meal.", ORDER, 0),
        ("There is no doubt that the answer is B.", COLOURS, 1),
        ("Without a doubt, the answer is B.", COLOURS, 1),
        ("If I had to choose, I'd say B.", COLOURS, 1),
        ("Not sure, but the answer is B", COLOURS, 1),
        ("I'm not sure but I think it's B", COLOURS, 1),
        ("There is no car, so the answer is B.", COLOURS, 1),
        ("Since A is not correct, the answer is B.", COLOURS, 1),
        ("The answer is B because the man does not run.", COLOURS, 1),
        ("It might be red.", COLOURS, 0),
        ("run (B)", DEEDS, 1),
        ("Of A, B, C and D, B is correct.", COLOURS, 1),
        ("None of A, C, D match, so B.", COLOURS, 1),
        ("The right answer is left.", ["left", "right"], 0),
        ("I initially chose A but B is better", COLOURS, 1),
        ("At first A seemed right, but B is correct.", COLOURS, 1),
        ("There is no one.", ["a man", "no one", "without a hat"], 1),
        ("While it is hard to tell, B is the best answer.", COLOURS, 1),
        ("A is wrong, B is wrong, C is wrong, so D.", COLOURS, 3),
        ("None of the other options match, so B", COLOURS, 1),
        ("There are 2 in the first frame and 2 in the last.", COUNTS, 1),
        ("He does it after he sits down.", ORDER, 1),
        # what is denied stands behind it, with its words or letters
        ("Answer: B (not A)", COLOURS, 1),
        ("Answer: B not A", COLOURS, 1),
        ("B (not red)", COLOURS, 1),
        ("A (not correct), B (correct)", COLOURS, 1),
        ("Option B (blue) is correct. Option A (red) is incorrect.", COLOURS, 1),
        ("Option A (red) is incorrect. Option B (blue) is correct.", COLOURS, 1),
        ("Option B (blue) is the correct answer. Option A (red) is not visible in the video.", COLOURS, 1),
        ("The correct answer is B, and A, C, and D are incorrect.", COLOURS, 1),
        ("The correct answer is B, A is wrong.", COLOURS, 1),
        ("The car is blue (B), not red (A) or green (C).", COLOURS, 1),
        ("A: incorrect. B: incorrect. C: correct. D: incorrect.", COLOURS, 2),
        ("A: wrong, B: right, C: wrong, D: wrong", COLOURS, 1),
        ("A (incorrect), B (correct), C (incorrect), D (incorrect)", COLOURS, 1),
        ("The answer is B; A is wrong because red never appears.", COLOURS, 1),
        ("B is right; A is not, since no red is seen.", COLOURS, 1),
        ("A is wrong because red never appears, and option B is correct because blue does.", COLOURS, 1),
        # what is granted first
        ("Although A seems right, the correct answer is B.", COLOURS, 1),
        ("While A is plausible, B is the best answer.", COLOURS, 1),
        ("Although the car seems red, it is blue.", COLOURS, 1),
        ("I am not sure, but I think it is blue.", COLOURS, 1),
        ("I'm not 100% sure, but B.", COLOURS, 1),
        ("I can't see it, but if I had to guess, B.", COLOURS, 1),
        ("None of the options match exactly, but B is closest.", COLOURS, 1),
        ("The answer is not given. However, blue is most likely.", COLOURS, 1),
        ("I'm not sure, but probably no.", ["yes", "no"], 1),
        ("Of the given options, only B matches the video.", COLOURS, 1),
        ("B is the only option that matches.", COLOURS, 1),
        ("La respuesta correcta es la B.", COLOURS, 1),
        ("Answer => B", COLOURS, 1),
        ("A - no\nB - no\nC - correct\nD - no", COLOURS, 2),
        (
            "**Option Analysis:**\n\n* **A. red** - at the start.\n* **B. blue** - no.\n\n**Final answer: B**",
            COLOURS,
            1,
        ),
        ("The answer is indeed B.", COLOURS, 1),
        ("My guess is C", COLOURS, 2),
        ("I lean towards C.", COLOURS, 2),
        ("Jawaban: C", COLOURS, 2),
        ("C. 3 (2 men and 1 woman)", COUNTS, 2),
        ("B. Mary tells John.", ["John", "Mary"], 1),
        # a box around what is no option
        (r"So $\boxed{x = 4}$ of them." "\nAnswer: D", COLOURS, 3),
        (r"The total is \boxed{12}. Answer: B", COLOURS, 1),
        (r"\boxed{\langle H\rangle}" "\n\n**Answer: D**", COLOURS, 3),
        (r"\boxed{3}", COUNTS, 2),
    ],
)
def test_beside_such_a_clause_an_answer_is_read(text, options, number):
    assert parse_choice(text, options) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("A: Let's think step by step. The man walks into the room and", None),
        ("A: Let\u2019s think step by step. The answer is (B).", 1),
        ("**A:** To answer this, we look at each frame. So it is C.", 2),
        ("A: The correct answer is B.", 1),
        ("A: First, he opens the door", None),
        ("A: the red car", 0),
        ("A: because it is red", 0),
    ],
)
def test_an_a_in_front_of_thoughts_stands_for_answer(text, number):
    """As in the prompts of MMLU-Pro; cut off, such a text says no A."""
    assert parse_choice(text, ["the red car", "the blue car", "the green car"]) == number
    assert parse_choice("A: Let's go home", ["Let's go home", "We stay"]) == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Answer: I as an AI cannot see", None),
        ("ANSWER: I and my colleagues", None),
        ("Answer: I", 8),
        ("I is right", 8),
    ],
)
def test_the_word_i_is_no_option(text, number):
    assert parse_choice(text, [f"car {n}" for n in range(9)]) == number


@pytest.mark.parametrize("form", WRAPPERS)
def test_yes_and_no_are_read_in_every_wrapper(form):
    for word, said in (("Yes", True), ("no", False), ("\uff39\uff45\uff53", True), ("No, there isn't", False)):
        text = form.replace("@", word)
        assert yes_or_no(text) is said, text
        if "yes" in word.lower():
            assert yes_or_no(form.replace("@", "yes or no")) is None
            assert parse_choice(text, ["yes", "no"]) == 0


@pytest.mark.parametrize(
    "text", ["\u662f", "\u662f\u7684\u3002", "\u7b54\u6848\uff1a\u662f", "Based on the video, yes.", "I would say yes."]
)
def test_other_plain_yeses(text):
    assert yes_or_no(text) is True


@pytest.mark.parametrize(
    "text",
    [
        "\u662f\u4e0d\u662f",
        "\u662f\u7ea2\u8272",
        "no-one",
        "yes/no",
        "The answer is yes. Wait, no.",
        "The answer is not yes",
    ],
)
def test_a_yes_or_no_in_doubt_is_none(text):
    assert yes_or_no(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 9999,
        r"\text{" * 9999,
        '"a_' * 9999,
        "$" * 19999,
        "{ " * 9999,
        "a—" * 9999,
        "not A, " * 9999,
        "so the " * 9999,
        "B " * 9999,
        "1," * 9999,
        "2 hundred " * 999,
        "no, maybe " + "not " * 9999,
        "no" + " " * 9999 + "no",
    ],
)
def test_long_answers_of_any_kind_are_read_or_not_but_end(text):
    assert parse_choice(text, OPTIONS) in (None, 0) and yes_or_no(text) is None


@pytest.mark.parametrize(
    ("text", "options", "number"),
    [
        ("three", ["2", "3", "4", "5"], 1),
        ("Three.", ["2", "3", "4", "5"], 1),
        ("There are three apples.", ["1", "3"], 1),
        ("3", ["two", "three"], 1),
        ("There are 2 dogs.", ["one", "two"], 1),
        ("one", ["1", "2"], 0),
        ("two or three", ["2", "3"], None),
        ("No one is there.", ["1", "2"], None),
        ("twenty-one", ["20", "1"], None),
    ],
)
def test_small_numbers_are_read_in_digits_and_words(text, options, number):
    assert parse_choice(text, options) == number


PLACES = ["kitchen", "bedroom", "living room", "garden"]


@pytest.mark.parametrize(
    "form",
    [
        *("{}. {}", "{}) {}", "({}) {}", "{}: {}", "[{}] {}", "{} - {}", "{}.{}"),
        *("\uff08{}\uff09{}", "{}\u3001{}", "\u3010{}\u3011{}", "{}\uff0e{}"),
    ],
)
@pytest.mark.parametrize("labels", ["ABCD", "abcd", "1234", "0123"])
def test_letters_and_numbers_in_front_of_options_are_no_words_of_theirs(form, labels):
    """Files of Video-MME's form have them; before, "a" alone went, as an article, and A was favoured."""
    if labels.isdigit() and form in ("{}.{}", "{} - {}", "{}\uff0e{}"):
        pytest.skip("may be numbers themselves")
    options = [form.format(label, place) for label, place in zip(labels, PLACES, strict=True)]
    assert choice_prompt("where?", options) == choice_prompt("where?", PLACES)
    for answer in ("{}", "{}.", "The answer is {}.", "It is the {}."):
        assert [parse_choice(answer.format(place), options) for place in PLACES] == [0, 1, 2, 3]
    for answer in ("{}", "({})", "The answer is {}."):
        assert [parse_choice(answer.format(letter), options) for letter in "ABCD"] == [0, 1, 2, 3]
    assert [parse_choice(option, options) for option in options] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "options",
    [
        ["A.D.", "B.C."],
        ["1.5", "2.5"],
        ["1:30", "2:30"],
        ["A. dog", "C. cat"],
        ["B. dog", "A. cat"],
        ["A. dog", "cat"],
        ["A. x", "B. x"],
        ["A", "B"],
        ["I. one", "II. two"],
        ["1. dog"],
        ["a - b", "b - a"],
    ],
)
def test_what_only_looks_like_a_label_stays(options):
    assert without_labels(options) == options


@pytest.mark.parametrize(
    ("text", "options", "number"),
    [
        ("He doesn't move.", ["He does not move.", "He runs."], 0),
        ("It is raining.", ["It's raining.", "It\u2019s snowing."], 0),
        ("It\u2019s snowing", ["It is raining.", "It is snowing."], 1),
        ("He can't swim.", ["He can swim", "He cannot swim"], 1),
        ("He can not swim.", ["He can swim", "He can't swim"], 1),
        ("She won't come", ["She will come", "She will not come"], 1),
        ("They're running", ["They are running", "They are walking"], 0),
        ("There is a dog.", ["There's a cat", "There's a dog"], 1),
        ("No, he does not.", ["Yes, he does.", "No, he doesn't."], 1),
        ("The man's hat", ["The man is hat", "The man's hat"], 1),
        ("A. That's wrong.", ["red", "blue"], None),
        ("No", ["Yes, two people work together", "No, she is alone"], 1),
        ("Yes.", ["Yes, he opens the door.", "No, he closes it.", "Not mentioned"], 0),
        ("Yes, he does.", ["Yes, he opens the door.", "No, he does not open the door.", "Not mentioned"], 0),
        ("Yes", ["Yes, by car", "Yes, by bus", "No, on foot"], None),
        ("No, he runs", ["Yes, he walks", "No, he stands"], None),
        ("No, he walks", ["Yes, he walks", "No, he stands"], None),
    ],
)
def test_short_forms_are_what_they_stand_for(text, options, number):
    assert parse_choice(text, options) == number


COLOURS = ["red", "blue"]
ACTS = ["He stands", "He sits on the sofa", "He leaves"]
TRUTHS, YES_NO, COUNTS = ["True", "False"], ["yes", "no"], ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("text", "options", "number"),
    [
        ("The answer is Cézanne.", ["Monet", "Dürer", "Goya", "Degas"], None),
        ("The answer is Dürer.", ["Monet", "Picasso", "Goya", "Degas"], None),
        ("Réponse: B", ["chien", "chat"], 1),
        ("Réponse : B", ["chien", "chat"], 1),
        ("I think it is Béyonce singing.", ["Adele", "Shakira", "Rihanna"], None),
        ("Kitchen. There is no bed in the room.", PLACES, 0),
        ("The car is red. It does not move.", COLOURS, 0),
        ("Red. It does not change colour.", COLOURS, 0),
        ("The video takes place in a kitchen. No other room is shown.", PLACES, 0),
        ("The video takes place in a kitchen. No, that is not it.", PLACES, None),
        ("Yes, the door is open. There are no people in the room.", YES_NO, 0),
        ("Yes! He is alone. There is no one else.", YES_NO, 0),
        ("The answer is yes. There are no other people.", YES_NO, 0),
        ("Yes, he is alone. No other person is visible.", YES_NO, 0),
        ("Yes, he is alone. Nobody else is visible.", YES_NO, 0),
        ("Yes. It is not dark.", YES_NO, 0),
        ("No. He says yes to her.", YES_NO, 1),
        ("Yes, it is. No, it isn't.", YES_NO, None),
        ("Yes. Actually no.", YES_NO, None),
        ("No... actually yes", YES_NO, None),
        ("Yes, there are no people.", YES_NO, None),
        ("He sits on the sofa. He does not leave.", ACTS, 1),
        ("False. The man does not sit.", TRUTHS, 1),
        ("False. There is no dog in the video.", TRUTHS, 1),
        ("True. The man is not wearing a hat.", TRUTHS, 0),
        ("The car is red. That is not true.", COLOURS, None),
        ("The car is red. No, it is not.", COLOURS, None),
        ("It is not red.", COLOURS, None),
        ("Red. Wrong.", COLOURS, None),
        ("The car is red. I am not sure.", COLOURS, None),
        ("No, there is no dog or cat in the video.", YES_NO, 1),
        ("No, nobody is in the room.", YES_NO, 1),
        ("No, he does not have a beard or a mustache.", YES_NO, 1),
        ("No, the man never opens the door.", YES_NO, 1),
        ("No, none of the people are wearing hats.", YES_NO, 1),
        ("No, neither of them is running.", YES_NO, 1),
        ("No, the man is not in the kitchen but in the living room.", YES_NO, 1),
        ("No, the dog is not sitting. It is standing next to a chair or table.", YES_NO, 1),
        ("Yes, she waits for a minute or two.", YES_NO, 0),
        ("Yes, there are two or three dogs.", YES_NO, 0),
        ("Yes, there is a dog in the image. It is sitting on a couch, but it is partially hidden.", YES_NO, 0),
        ("Yes, but not now", YES_NO, None),
        ("Yes or no", YES_NO, None),
        ("Yes, or maybe no", YES_NO, None),
        ("Yes. But I am not sure.", YES_NO, None),
        ("No, but he did later", YES_NO, None),
        ("Yes, there is not", YES_NO, None),
        ("No. Yes.", YES_NO, None),
        ("Yes. No, wait.", YES_NO, None),
        ("No, perhaps", YES_NO, None),
        ("Yes, he never stops", YES_NO, None),
        ("There is one person in the video.", COUNTS, 0),
        ("One person", COUNTS, 0),
        ("Only one.", COUNTS, 0),
        ("Just one.", COUNTS, 0),
        ("I can see one dog.", COUNTS, 0),
        ("The number of people is one.", COUNTS, 0),
        ("There is a total of one car in the video.", COUNTS, 0),
        ("It takes one minute.", ["1 minute", "2 minutes"], 0),
        ("the last one", COUNTS, None),
        ("one of them", COUNTS, None),
        ("There is one person.", ["one person", "two people"], 0),
        ("the one on the left", ["1", "2"], None),
        ("This is one of two", ["1", "2"], 1),
    ],
)
def test_what_else_an_answer_says_denies_it_where_it_is_about_it(text, options, number):
    """A letter with an accent is none; other sentences explain; "no, or" and "no, never" are a no; "one" is counted."""
    assert parse_choice(text, options) == number


FOUR, THREE_TO_SIX = ["red", "blue", "green", "yellow"], ["3", "4", "5", "6"]
ROOMS, REASONS = ["Kitchen", "Garden", "Garage", "Street"], ["Because he is tired", "Because he is hungry"]


@pytest.mark.parametrize(
    ("text", "options", "number"),
    [
        ("The answer is B because the red car leaves first.", FOUR, 1),
        ("The correct answer is B. blue, because the red car leaves first.", FOUR, 1),
        ("The answer is B: blue, because the red car leaves first.", FOUR, 1),
        ("The answer is (B) blue because the red car leaves first.", FOUR, 1),
        ("The answer is (B) Garden, since the man leaves the kitchen.", ROOMS, 1),
        ("The best answer is B) Garden because he walks out of the garage.", ROOMS, 1),
        ("The answer is (C) 5 because there are 3 men and 2 women.", THREE_TO_SIX, 2),
        ("(B) blue because the red car leaves first.", FOUR, 1),
        ("B because he walks out of the garage.", ROOMS, 1),
        ("The answer is blue because the red car is behind it.", FOUR, 1),
        ("The answer is 5 because I see three red cars and two blue ones.", THREE_TO_SIX, 2),
        ("Garden. He walks out of the garage.", ROOMS, None),
        ("B. Because he is tired", REASONS, None),
        ("B. Because he is hungry", REASONS, 1),
        ("The answer is (B) red because the red car leaves.", FOUR, None),
        ("The answer is B or C because it is red", FOUR, None),
        ("(B) red because it is so", FOUR, None),
        ("The answer is red or blue because both", FOUR, None),
        ("B because A is wrong", FOUR, 1),
    ],
)
def test_a_reason_behind_the_answer_may_name_other_options(text, options, number):
    assert parse_choice(text, options) == number


OPENINGS = (
    *("", "After reviewing all the options, ", "Based on the video, ", "Let's check each option.\n"),
    *("To determine the correct answer, let's go step by step.\n\n", "The video shows a street.\n", "Okay, "),
)
STATEMENTS = (
    *("the answer is {L}.", "the correct answer is:\n\n{L}. {O}", "the correct answer is: {O}"),
    *(
        "option {L} is correct.",
        "the right answer is '{L}. {O}'.",
        "the answer would be:\n**({L}) {O}**",
        "I'd go with option {L}.",
    ),
    *("the best option is:\n\n- {L}: {O}", "my final answer is\n{L}", "the answer to the question is:\n{O}."),
)
LINES = (
    *("### Final Answer\n\n{L}. {O}", "**Answer:**\n\n**{L}. {O}**", "Selected: {L}", "Option {L}.", "Option ({L})"),
    *("Conclusion:\n({L}) {O}", "Answer\n{L}", "Correct answer:\n{O}", "{L}"),
)
CLOSINGS = ("", "\n\nExplanation: see the third frame.", "\n\nNone of the others fits.", "\n\nI hope this helps!")


@pytest.mark.parametrize("closing", CLOSINGS)
@pytest.mark.parametrize("form", STATEMENTS + LINES)
def test_an_opening_a_statement_and_a_closing_are_read_together(form, closing):
    """Each answer is read behind each opening and in front of each closing, as it is alone."""
    for options, number in ((["red car", "blue bus", "green bike"], 1), (["to dance", "to sing", "to open it"], 2)):
        answer = form.format(L="ABC"[number], O=options[number])
        for opening in OPENINGS:
            if opening.endswith(" ") and form in LINES:
                continue
            text = opening + (answer if opening.endswith(" ") else answer[:1].upper() + answer[1:]) + closing
            if form in ("Option {L}.", "Option ({L})") and closing and opening.startswith(("Let's", "To determine")):
                assert parse_choice(text, options) is None, text  # it may be the first of a list
                continue
            assert parse_choice(text, options) == number, text


@pytest.mark.parametrize(
    "text",
    [
        *("The correct answer is:\nA. red car\nB. blue bus", "Answer:\nA. red car: no\nB. blue bus: yes"),
        *("To find the answer:\nA. red car: not shown\nB. blue bus: not shown", "The wrong answer is: blue bus"),
        *("The answer is:\nA. red car or\nB. blue bus", "Possible answer:\nA. red car\nB. blue bus"),
        *("A. red car is not shown. B. blue bus is not shown. C", "A man enters. Plan B.", "Is it A or B? B."),
        *("Let's check each option.\n\nOption A.\nIt is red.", "The red car comes first.\nB. It is overtaken."),
    ],
)
def test_a_heading_or_a_letter_at_the_end_is_no_answer_beside_others(text):
    assert parse_choice(text, ["red car", "blue bus", "green bike", "yellow truck"]) is None


STORY = ["He is happy", "He wants to open the door", "To greet his friend", "He dropped the keys"]


@pytest.mark.parametrize(
    "answer", ["The correct answer is B. {}", "Answer: B\n\n{}", "B\n\nExplanation: {}", "B. {}", "{}\n\nAnswer: B"]
)
@pytest.mark.parametrize(
    "other",
    [
        *("Options A and C happen later.", "Options C and D never appear.", "A and C are shown later."),
        *("Options (A) and (C) are visible only later.", "Options A or C refer to the start.", "A or D would not fit."),
        *("Options A and C are less likely.", "Both A and C contradict the video.", "A and C are incorrect."),
    ],
)
def test_what_a_sentence_says_of_two_others_changes_no_answer(answer, other):
    assert parse_choice(answer.format(other), STORY) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("A and C", "The answer is A or C.", "Options A and C are correct.", "A and C happen later.", "Both A and C"),
        *("The answer is B. Options A and C are also correct.", "The answer is: A and C because both are shown."),
    ],
)
def test_two_options_that_are_said_are_none(text):
    assert parse_choice(text, STORY) is None


@pytest.mark.parametrize(
    "form",
    [
        *("({}) {}", "{}) {}", "{}: {}", "{}. {}", "{} - {}", "{} ({})", "Option {}: {}", "The answer is ({}) {}."),
        *("The correct answer is {}: {}", "**{}) {}**", "Answer: ({}) {}"),
    ],
)
@pytest.mark.parametrize(
    "option",
    [
        *("Not sure", "Cannot be determined", "Not shown", "None of the above", "I don't know", "Nobody", "False"),
        *("He does not open the door", "It is not shown", "Impossible to tell", "No one", "Never"),
    ],
)
def test_an_option_that_denies_something_denies_not_its_own_letter(option, form):
    options = ["red", "blue", "green", option]
    assert parse_choice(form.format("D", option), options) == 3
    assert parse_choice(f"{option} (D)", options) == parse_choice(f"The answer is {option} (D).", options) == 3
    assert parse_choice(form.format("A", option), [option, "red", "blue"]) == 0


@pytest.mark.parametrize("text", ["(D) not shown", "D: not visible", "C is not shown (D)", "(D) Not sure, or (A)"])
def test_words_that_deny_another_option_still_do(text):
    assert parse_choice(text, ["red", "blue", "green", "Not sure" if "sure" in text else "yellow"]) is None


@pytest.mark.parametrize(
    "form", [r"\boxed{{12{}\text{{cm}}}}", r"$\boxed{{12{}\mathrm{{cm}}}}$", r"So it is \boxed{{12{}\text{{cm}}}}."]
)
@pytest.mark.parametrize("space", [r"\,", r"\, ", "~", " ", r"\;"])
def test_a_unit_in_a_box_stands_behind_any_space_of_latex(form, space):
    assert parse_choice(form.format(space), ["15 cm", "12 cm", "20 cm"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("Jawabannya adalah C", "Jadi, jawabannya adalah **C**.", "Jawaban: Jawaban: C", "Antwort:\n\nAntwort: C"),
        *("\ub2f5\uc740 (C) \uc785\ub2c8\ub2e4", "\ub2f5: C", "Jibu ni (C)", "C\u00e2u tr\u1ea3 l\u1eddi l\u00e0 (C)"),
        *(
            "\u0627\u0644\u0625\u062c\u0627\u0628\u0629 \u0647\u064a (C)",
            "\u0e04\u0e33\u0e15\u0e2d\u0e1a\u0e04\u0e37\u0e2d (C)",
        ),
        *(
            "\u0909\u0924\u094d\u0924\u0930 (C) \u0939\u0948",
            "\u0989\u09a4\u09cd\u09a4\u09b0 \u09b9\u09b2 (C)",
            "\u041e\u0442\u0432\u0435\u0442 - (C)",
        ),
        *("Antwort C", "Antwort C ist richtig.", "Ich w\u00e4hle Antwort (C)", "Respuesta C", "R\u00e9ponse C"),
    ],
)
def test_other_languages_name_an_answer_too(text):
    assert parse_choice(text, ["Bern", "Rom", "Wien", "Paris"]) == 2


VERBS = forms(r"""
This corresponds to @. | which corresponds to @. | This matches @. | This means @. | It suggests @. | This indicates @.
The evidence points to @. | The video supports @. | This makes @ the correct answer. | Well, @. | Obviously, @.
Based on the video, @. | Maybe @. | Perhaps @. | @ only | @ it is. | @ would be the best choice. | @ fits best.
=> @ | → @ | The answer is <@>. | <b>@</b> | Answer: $@ | Answer: $(@) | Answer: ${@}
\boxed{\bf @} | \boxed{{@}} | @ [/INST] | @ (final answer)
The option which is correct is @. | **✅ @. (correct)**
""")


@pytest.mark.parametrize("form", VERBS)
def test_a_sentence_that_only_ends_in_a_letter_names_it(form):
    for number in range(3):
        text = form.replace("@", LETTERS[number])
        assert parse_choice(text, OPTIONS) == number, text
    assert parse_choice(f"{form.replace('@', 'B')}\n{form.replace('@', 'C')}", OPTIONS) is None


ONLY = """只有选项B是对 | 只有B对。 | 选项A不对，只有选项B是对的。 | 选项A说的是红色，只有选项B是对的。
A选项错误，C选项错误，故B。 | 选项A是红色，选项C说的是蓝色，只有选项B是正确的。 | A不符合视频，C也不符合，只有B对。
A、C、D都是错误的，只有选项B是正确的。 | 唯有B正确"""


@pytest.mark.parametrize("options", [["男人打开门", "男人切辣椒", "女人坐下", "狗跑出去"], OPTIONS])
@pytest.mark.parametrize("text", ONLY.replace("\n", " | ").split(" | "))
def test_only_one_is_right_in_chinese(text, options):
    assert parse_choice(text, options) == 1


@pytest.mark.parametrize("text", ["不只有B对，C也对", "只有B不对", "并非只有B是对的"])
def test_not_only_one_is_right_in_chinese(text):
    assert parse_choice(text, OPTIONS) is None


def test_labels_of_options_two_of_which_say_the_same_are_left_out():
    """As in a question of Video-MME."""
    options = ["A. (a)(c)(b).", "B. (c)(a)(b).", "C. (c)(b)(a).", "D. (a)(c)(b)."]
    assert "(B) (c)(a)(b)." in choice_prompt("In which order?", options)
    for answer in ("The correct order is (c)(a)(b).", "(c)(a)(b)", "(B) (c)(a)(b).", "B", "B. (c)(a)(b)."):
        assert parse_choice(answer, options) == 1, answer
    colours = ["A. red", "B. blue", "C. green", "D. red"]
    assert [parse_choice(answer, colours) for answer in ("It is blue.", "green", "D", "red")] == [1, 2, 3, 0]
    assert without_labels(["A: 30", "B: 30"]) == ["A: 30", "B: 30"]


SMALL = """The correct answer is @ because the mat is visible. | The answer is @, since it moves. | The answer is @
Option @ is correct. | option @: it fits | The correct option is @ as he runs. | The right choice is @. | answer @"""


@pytest.mark.parametrize("options", [OPTIONS, ["a red car", "a blue car", "a green car"]])
@pytest.mark.parametrize("form", SMALL.replace("\n", " | ").split(" | "))
def test_a_small_letter_behind_answer_or_option_names_it(form, options):
    for number in range(3):
        text = form.replace("@", LETTERS[number].lower())
        assert parse_choice(text, options) == number, text


@pytest.mark.parametrize("text", ["The best answer a person gives is to run.", "The answer is a car.", "option b-roll"])
def test_a_small_letter_that_is_a_word_names_none(text):
    assert parse_choice(text, ["a red car", "a blue car", "a green car"]) is None


@pytest.mark.parametrize(
    "form", ["@ is correct.", "Option @ is the best.", "The answer is @.", "@ is the correct answer."]
)
def test_a_letter_that_is_a_name_in_the_options_is_read_where_the_answer_is_spoken_of(form):
    options = ["C cooks", "C is writing", "C cleans the floor", "A man talks"]
    assert [parse_choice(form.replace("@", letter), options) for letter in "BC"] == [1, 2]
    assert parse_choice("C is cooking.", options) is None


@pytest.mark.parametrize(
    ("text", "options", "number"),
    [
        ("The winner is person B.", ["Person B", "Person A", "Both", "Neither"], 0),
        ("The winner is person B.", ["Person A", "Person B", "Both", "Neither"], 1),
        ("Person B wins.", ["person B", "person A", "both", "neither"], 0),
        ("A: person B", ["Person B", "Person A", "Both", "Neither"], 0),
        ("The game is won by team B.", ["Team B", "Team A", "A tie"], 0),
        ("He enters room C.", ["Room C", "Room B", "Room A"], 0),
        ("It contains vitamin C.", ["Calcium", "Vitamin D", "Vitamin C"], 2),
        ("The correct answer is C: both A and B.", ["a red car", "a blue car", "Both A and B", "None of the above"], 2),
        ("The answer is C because both A and B are shown.", ["red", "blue", "Both A and B", "None"], 2),
        ("The correct answer is both A and B.", ["red", "blue", "Both A and B", "None"], 2),
        ("C. Both A and B", ["red", "blue", "both A and B", "none"], 2),
        ("It shows neither A nor B.", ["Only A", "Only B", "Both A and B", "Neither A nor B"], 3),
        ("It's false.", ["True", "False"], 1),
        ("False (option B)", ["True", "False"], 1),
        ("Yes is the correct answer.", ["yes", "no"], 0),
        ("✅ A. Yes", ["yes", "no"], 0),
        *((text, ["B", "A", "D", "C"], 0) for text in ("(A) B", "A. B", "The answer is A. B")),
        ("A", ["B", "A", "D", "C"], None),
    ],
)
def test_letters_within_options_are_the_options_in_any_case(text, options, number):
    assert parse_choice(text, options) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He sits, he waves, and he opens the door. All of the above.", 3),
        ("All of the above: he sits, he waves.", 3),
        ("Since he sits and he waves, the answer is D.", 3),
        ("Not all of the above.", None),
        ("The answer is D, he waves.", None),
        ("He sits and he waves.", None),
    ],
)
def test_all_of_the_above_names_the_others(text, number):
    assert parse_choice(text, ["He opens the door", "He sits", "He waves", "All of the above"]) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It shows both red and blue.", 2),
        ("The answer is C: red and blue.", 2),
        ("Both cars are red.", None),
        ("Red and blue.", None),
    ],
)
def test_both_names_two(text, number):
    assert parse_choice(text, ["red", "blue", "both", "neither"]) == number


POLAR = forms(r"""
@—it @@. | @⏎⏎Explanation: it is so. | @⏎The man does not close it. | The man sits. @. | The man sits.⏎@
It @@, @. | Probably @. | From what I can see, @. | Response: @ | Indeed, @. | @ in the video it @@. | He @@, so @.
Most likely, @. | As far as I can tell, @. | According to the video, @. | @, at the end it @@.
""")


@pytest.mark.parametrize("form", POLAR)
def test_the_judge_reads_a_yes_or_no_where_a_choice_does(form):
    for word, verb, said in (("Yes", "does", True), ("no", "does not", False)):
        text = form.replace("@@", verb).replace("@", word)
        assert yes_or_no(text) is said, text
        assert parse_choice(text, ["No", "Yes"]) == said, text


@pytest.mark.parametrize("text", ["Absolutely not.", "Probably not", "Not at all, no.", "Most likely not."])
def test_a_strong_not_is_a_no(text):
    assert yes_or_no(text) is False and parse_choice(text, ["Yes", "No"]) == 1


@pytest.mark.parametrize("text", ["Probably not red.", "Not at all the red one", "Yes. It is not."])
def test_what_is_beside_it_keeps_it_in_doubt(text):
    assert yes_or_no(text) is None


KILOS, ENERGIES = [r"$5\,\text{kg}$", r"$10\,\text{kg}$"], [r"$1.1\mathrm{MeV}$", r"$3.3\mathrm{MeV}$"]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        *((text, ["$12$", "$15$"]) for text in ("15", "The answer is 15.", r"\boxed{15}", "$15$", "(B) $15$")),
        *((text, ["12", "15"]) for text in ("$15$", "The answer is $15$.", r"\(15\)")),
        *((text, ["$x^2$", "$x^3$"]) for text in ("The answer is $x^3$.", "x^3")),
        *(
            (text, ENERGIES)
            for text in (r"\boxed{3.3\mathrm{MeV}}", "3.3 MeV", "It is 3.3MeV.", r"(B) $3.3\mathrm{MeV}$")
        ),
        *((text, KILOS) for text in ("10 kg", "10kg", r"\boxed{10\,\text{kg}}")),
        *((text, [r"$\frac{1}{2}$", r"$\frac{1}{3}$"]) for text in (r"\boxed{\frac{1}{3}}", "1/3")),
        ("10%", [r"$5\%$", r"$10\%$"]),
        ("60°", [r"$30^\circ$", r"$60^{\circ}$"]),
        *((text, ["$5", "$6"]) for text in ("$6", "It costs $6.", "$6 and not $5")),
    ],
)
def test_formulas_of_latex_are_what_stands_in_them(text, options):
    assert parse_choice(text, options) == 1


def test_two_prices_are_no_formula():
    assert parse_choice("The prices are $5 and $6.", ["$5", "$6"]) is None


@pytest.mark.parametrize(
    "text",
    forms("""
【答案】B | 【正确答案】(B) | A、C、D错误,故选B。 | A、C、D错误,B正确。故选B。 | 选项A、C、D错误,选项B正确。故选:B。
我认为是B | 答案是B。
A、C、D均不符合视频内容,因此选B。 | 应该是B。 | B选项 | B项 | A项错误;B项正确;C项错误;D项错误。故选B。
"""),
)
def test_an_answer_in_a_chinese_sentence_is_read(text):
    assert parse_choice(text, COLOURS) == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("答案是洗碗", 1),
        ("视频中的人在洗碗。", 1),
        ("B、洗碗", 1),
        ("视频中的人没有洗碗。", None),
        ("洗碗和扫地", None),
    ],
)
def test_words_of_a_script_without_blanks_are_found_in_a_sentence(text, number):
    assert parse_choice(text, ["切菜", "洗碗", "扫地", "做饭"]) == number


LEFT = forms(r"""
That leaves @. | This leaves us with @. | A is wrong, leaving @ as the answer. | By elimination, @. | I vote @
My pick is @. | I have chosen @. | I conclude @. | It can only be @. | It's got to be @.
@ is what the video shows. | @ works best. | @ describes it best. | @ is the one. | @ remains. | So @ it is.
Answer: rules out A, leaving @ | A is ruled out, leaving only @. | Eliminating A leaves @.
We are left with option @. | @ is left.
@ - because it fits | [x] @ | - [ ] A. a dog⏎- [x] @ | @ is the remaining option.
""")


@pytest.mark.parametrize("form", LEFT)
def test_an_answer_that_is_left_chosen_or_ticked_is_read(form):
    for number in (1, 2):
        text = form.replace("@", LETTERS[number])
        assert parse_choice(text, OPTIONS) == number, text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The second option is correct.", 1),
        ("The second option", 1),
        ("The first option is wrong, so the third option is correct.", 2),
        ("The first option is wrong.", None),
        ("The first answer is no good.", None),
        ("The second one", None),
        ("I would have chosen B if it barked.", None),
        ("B is the one that is not shown.", None),
        ("That leaves B and C.", None),
        ("It rules out A, leaving B and C.", None),
        ("A is ruled out, leaving B or C", None),
        ("I would not vote for B.", None),
        ("[x] A\n[x] B", None),
    ],
)
def test_an_option_is_named_by_its_place_and_by_nothing_less(text, number):
    assert parse_choice(text, OPTIONS) == number


@pytest.mark.parametrize(
    "text",
    [
        "I considered (A) and (B), but they are incorrect. Final answer: C.",
        "I considered A or B.\nFinal answer: C",
        "I was going to say (A). Final answer: C.",
        "I was going to say (A), but the final answer is C.",
        "I first thought the answer is A, but it is incorrect. Final answer: C.",
    ],
)
def test_what_was_considered_first_changes_no_final_answer(text):
    assert parse_choice(text, OPTIONS) == 2
