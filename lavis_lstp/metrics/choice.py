"""Multiple choice: what is asked, and which option an answer names.

An answer that names no option, several, or a letter and another option's words, or that says what it is not, is
*unparsable*: wrong, counted, and never guessed at.
"""

from __future__ import annotations

import bisect
import functools
import re
import string
from collections.abc import Callable, Collection, Sequence

from lavis_lstp.metrics.numbers import counted, written
from lavis_lstp.metrics.qa import (
    DENIES_ANOTHER,
    REASON,
    folded,
    normalise,
    without_latex,
    without_markup,
    without_thoughts,
    wrapped,
    written_out,
    yes_or_no,
)

LETTERS = string.ascii_uppercase
_MARK = 0xE000  # from here on, characters of private use stand for letters of options
_V = r"\(?([\ue000-\ue019])\)?"
_L = r"\(?[\ue000-\ue019]\)?"
_OPEN, _CLOSE = r"""[(\[{<"'\u300c\u300e\u3010\u300a\u201c]""", r"""[)\]}>"'\u300d\u300f\u3011\u300b\u201d]"""
_LONE = re.compile(r"[^\w?+#/~%$\u20ac\u00a3\u00b0=-]*([A-Za-z])[^\w?+#/~%$\u20ac\u00a3\u00b0=-]*")
_LABEL = re.compile(r"\([A-Za-z]\)|\[[A-Za-z]\]|[A-Za-z][).:,](?![A-Za-z]\.)|[A-Z] - ")
_LABEL_BEHIND = re.compile(r"(?:[(\[][A-Za-z][)\]]|, [A-Z])\W*$")
_LETTER = re.compile(
    rf"{_OPEN}([A-Za-z]){_CLOSE}(?!\?)"
    r"|(?<![A-Za-z0-9_.+#/\u00c0-\u024f-])(?<!\w')(?:([B-HJ-Z])(?![A-Za-z0-9_'+#?\u00c0-\u024f]|[-/][A-Za-z0-9]|\.[A-Za-z]\.)"
    r"|([AI])(?=[).:,;!\u3001\u3002](?![A-Za-z]\.)|[^\x00-\x7f\u00c0-\u024f]|\s*$| - "
    r"|\s+(?:because|since|is|seems|best|over|rather|instead)\b"
    r"|\s+\((?:correct|final|right)\b|(?<=A)\s+(?:as|and|or|nor|but|for|are|would|fits|matches|only|it is|the)\b)"
    r"|(?<=ption |hoice |etter )([AI])\b"
    r"|(?<=ption |hoice |etter |nswer |er is |on is |ce is )([b-hj-z](?![\w'+#?/\u00c0-\u024f-])"
    r"|a(?=[).:,;](?![A-Za-z])|\s+(?:because|since|as|is)\b))"
    r"|(?<!\d )([a-z])(?=[.\u3002]?\s*\Z)|\A([a-z])(?=[).:,](?![A-Za-z]\.)))",
    re.MULTILINE,
)
"""A letter that stands for an option: "A" and "I" are words before most others, and so is a small letter in a text.

But "the answer is d" and "option d" name an option.
"""
_ACTS = re.compile(
    r"'s\b|,? (?:who|the|is|was|then|also|first)\b(?! (?:the )?(?:correct|right|best|most|answer))"
    r"| (?!(?:is|was|as)\b)[a-z]+(?:s|ed|ing)\b"
)
"""These words follow a letter that is somebody's name: "C is cooking"."""
_FIRST = re.compile(
    r"\(([\ue000-\ue019])\)|([\ue000-\ue019])(?:[).:,;\u3001\u3002]|(?= -(?: |$)| [(\[]| (?:because|since)\b|$))",
    re.MULTILINE,
)
_BELOW = re.compile(rf"(?<=[^:]\n)(?:{_FIRST.pattern})", re.MULTILINE)
"""The same below what is said of the video, but no heading: "The man is at the stove.", then "B. He stirs a pot."."""
_MORE = re.compile(r"\(([\ue000-\ue019])\)|([\ue000-\ue019])(?=[).:,]|$)", re.MULTILINE)
"""Letters after the one that an answer begins with: "(A) or (B)", "A, B"."""
_AHEAD = r"(?=\(?[\ue000-\ue019])"
_WEIGHS = re.compile(
    r"\b(?:each|every|all|any)(?: of)?(?: the)?(?: [a-z]+)?"
    r" (?:options?|choices?|answers?|letters?|candidates?|statements?)\b"
    r"|\b(?:find|determine|identify|figure out|evaluate|analy[sz]e|consider|look(?:ing)? at|check|compare|examine"
    r"|review|go(?:ing)? through|assess|eliminate|break down|verify) (?:out )?(?:the |which |them|these |our |one )*"
    r"(?:[a-z]+ ){0,2}?(?:answer choices|answer|options?|choices?|one by one)\b(?! is\b)"
    r"|\bone of the following\b"
    rf"|\bwhich(?: [a-z]+){{0,3}} (?:right|correct|best|true|accurate|appropriate)\b(?!(?: [a-z]+)? (?:is|be) {_L})"
    rf"|\b(?:if|for) (?:the )?(?:[a-z]+ )?(?:answer|option|choice) (?:is|were|was|to be)\b ?{_AHEAD}"
    r"|\b(?:one|some(?:one)?|you|people|they) (?:could|might|may|would|can)"
    rf" (?:say|think|believe|choose|pick) {_AHEAD}"
    r"|\b(?:(?:check|start|consider|examin|look|evaluat|analy[sz])[a-z]*(?: with| at)?|first|regarding|as for)"
    rf" (?:option|choice) {_AHEAD}"
    rf"|\b(?:option|choice) (?={_V} (?:says|shows|mentions|states|describes|suggests|claims|depicts|refers|is an?)\b)"
    rf"|\b(?:first|second|third|next|last) (?:option|choice) is {_AHEAD}"
    rf"|\u9009\u9879 ?(?={_V} ?(?:\u8bf4|\u8bb2|\u63d0\u5230|\u63cf\u8ff0|\u663e\u793a|\u8868\u793a|\u6307"
    r"|\u662f(?![\u5bf9\u6b63\u7b54\u6700\u5408\u9519\u4e0d])))"
)
"""What announces that options are weighed: "Let's look at each option: A. ..." says no A."""
_FILL = (
    r"(?:(?:the|la|el|le|die|opci\u00f3n|option|choice|answer|letter|clearly|definitely|most|likely|probably|obviously"
    r"|simply|still|indeed|thus|actually|therefore|hence) )*[\"'\u2018\u201c]?"
)
_OTHER_ANSWERS = (
    r"respuesta|opci\u00f3n|antwoord|jawaban(?:nya)?|r\u00e9ponse|antwort|resposta|risposta|jibu"
    r"|c\u00e2u tr\u1ea3 l\u1eddi|\u0111\u00e1p \u00e1n"
)
"""An answer in Spanish, Dutch, Indonesian, French, German, Portuguese, Italian, Swahili and Vietnamese."""
_SAID = re.compile(
    r"(?:\b(?:ans|answer|assistant|prediction|response|output|result|guess|vote|pick|selection|selected|verdict"
    r"|solution|conclusion|option|choice|letter|correct|right|best|accurate|appropriate|suitable|likely|plausible|closest|nearest"
    rf"|{_OTHER_ANSWERS})\b"
    r"(?:(?! (?:options|choices|each|every|all)\b) [a-z]+){0,6}?"
    r"(?:(?:'s| (?:is|be|es|est|ist|lautet|adalah|\u00e9|\u00e8|ni|l\u00e0)\b) ?:?| ?(?:[:=]>?|-+>?)) *"
    r"|\b(?:it|that)(?:'s| is(?: got to be)?| (?:must|should|would|could|might|may|has to|appears to|seems to"
    r"|would have to|can only|could only) be) "
    r"|\b(?:that|this|which) leaves (?:us with )?"
    r"|\b(?:leav(?:es|ing)(?: us with)?|(?:am|are|i'm|we're) left with) (?:only |just )?"
    rf"(?=(?:option |choice )?{_V}(?: as\b|[.!]|\s*$))"
    r"|\b(?:go(?:ing)? (?:with|for)|choos(?:e|ing):?|chose|select(?:ing|ed)?|pick(?:ing|ed)?|opt(?:ing)? for"
    r"|chosen|vote(?: for)?|settled? on"
    r"|lean(?:ing)?(?: towards?)?|answer with|say|guess|think|believe|conclude)(?:,? that|,? it is|,? it's)*,? "
    rf"|[\u53ea\u552f]\u6709(?:\u9009\u9879)? ?(?={_V} ?\u662f?\u6700?(?:\u5bf9|\u6b63\u786e|\u7b26\u5408|\u5408))"
    rf"|(?:\u6545|\u56e0\u6b64|\u6240\u4ee5)[,:]? ?(?={_V}[.\u3002]*(?:\s|$))"
    rf"|\bonly (?=(?:option |choice |answer )?{_V} (?:matches|fits|is|describes|explains|can|could|makes|remains)\b)"
    r"|(?<![\u4e0d\u6ca1\u522b])(?:\u7b54\u6848|\u9009\u9879|\u9009\u62e9?|\u7b54\u3048|\u6b63\u89e3|\ub2f5|\u043e\u0442\u0432\u0435\u0442"
    r"|\u0627\u0644\u0625\u062c\u0627\u0628\u0629|\u0627\u0644\u062c\u0648\u0627\u0628|\u0e04(?:\u0e33|\u0e4d\u0e32)\u0e15\u0e2d\u0e1a|\u0909\u0924\u094d\u0924\u0930|\u0989\u09a4\u09cd\u09a4\u09b0"
    r"|\u8ba4\u4e3a|\u5e94\u8be5?\u662f)"
    rf"(?:\u5e94\u8be5?|\u662f|\u4e3a|\u9009|\u306f|\uc740|\u0647\u064a|\u0647\u0648|\u0e04\u0e37\u0e2d|\u09b9\u09b2(?:\u09cb)?|[:\]\u3011-]|\s)*){_FILL}{_V}",
    re.MULTILINE,
)
_AHEAD_OF_ANSWER = r"(?:(?:so|thus|hence|therefore|the|my|final|correct|right|best|most|likely|chosen|selected),? )*"
_ANSWER_LINE = re.compile(
    rf"(?i:{_AHEAD_OF_ANSWER}(?:answer|choice|ans)\.?(?: to (?:the|this|your) question)?(?: is)?[: ]+)"
)
"""What a line or sentence that states the answer begins with."""
_ANSWER_IS = r"\b(?:answer|choice|option)(?: [a-z]+){0,6} (?:is|be)"
_ITEMS = re.compile(rf"\(?[\ue000-\ue019]|(?:(?!{_ANSWER_IS} ?:).)*?[:\n]")
"""Options follow what announces them: behind a colon that is not the answer's, or on lines of their own."""
_HEADING = re.compile(
    rf"(?im)((?:^[ #]*|(?<=[.,;:!?]) +){_AHEAD_OF_ANSWER}(?:answer|ans|choice|option|selection|verdict|conclusion)"
    rf"|{_ANSWER_IS})[ ]*[:.]?[ ]*\n\s*(?=\S)"
    r"(?!\W*[a-z][).:].*\n\s*\W?[a-z][).:])"
)
"""A heading that the answer stands below, but no list."""
_THINKS = re.compile(
    r"\A\W*A:[\s*_]*(?=(?i:let's|let us|let me|to (?:answer|determine|find|solve|figure)|we (?:need|have|are|can|know)"
    r"|(?:the|my) (?:[a-z]+ )?(?:answer|option|choice) is|(?:okay|ok|sure|first)(?=,))(?!\w))"
)
"""Where "A:" stands for "answer", as in "A: Let's think step by step."; options that begin so are labelled with it."""
_STATED = re.compile(r"\n|(?<=[.!?])(?<!\b[A-Z]\.)\s+")
_THUS = re.compile(
    r"(?:^|[.,;:!] )(?:so|thus|therefore|hence|finally|(?:in )?conclusion|overall|probably|(?:most )?likely"
    rf"|definitely|clearly|certainly)[,:]? {_FILL}{_V}(?=[.,;:!]| because\b|\s*$)"
    rf"|\b(?:corresponds?|aligns?|match(?:es)?|points?)(?: to| with)? (?:option|choice|answer) {_V}(?=[.!]|\s*$)",
    re.MULTILINE,
)
_BESIDE = r"(?: \((?!incorrect|correct|right|wrong|true|false|not\b)[^()\n]*\))"
_RIGHT = re.compile(
    rf"{_V}{_BESIDE}?(?: (?:is|seems|appears|looks|would be|should be|must be)"
    r"(?: (?!(?:rarely|hardly|almost|nearly|partly|partially|less|far|anything|too|hard|second)\b)[a-z]+){0,4}? "
    r"(?:correct|right|best|better|true|accurate|answer|choice|appropriate|likely|suitable|plausible)"
    r"(?= (?:answer|option|choice|one|because|since|as|and|given|here)\b|\)?[.,;:!\s]*(?:\n|$)|[.,;:!])"
    r"| is (?:the )?closest\b"
    r"| is the only (?:option|choice|answer|one) (?:that|which)\b(?! (?:[a-z]+ )?(?:not|never)\b| [a-z]+n't)"
    r"| (?:fits|matches|is consistent with|is supported by|corresponds to) the (?:video|clip|footage|scene)\b"
    r"| is what the (?:video|clip|footage) shows\b"
    r"| is the (?:remaining (?:option|choice|answer)|one)(?=[.!,]|\s*$)"
    r"| (?:fits|matches|works) best\b| (?:describes|explains|answers) it best\b| (?:best|most (?:accurately|closely)) "
    r"(?:describes|matches|fits|answers|represents|captures|explains|reflects)\b"
    r"|(?:\u9009\u9879)?[\u662f\u4e3a]?\u6700?(?:\u6b63\u786e|\u5bf9\u7684|\u7b54\u6848|\u5408\u9002))"
    rf"|\bmak(?:es|ing) {_FILL}{_V} (?:the )?(?:only |most )?(?:correct|right|best|likely|plausible|appropriate)\b"
)
_TICKED = re.compile(
    rf"^ ?[\u2705\u2714]\ufe0f? ?{_V}(?=[).:,;])"
    rf"|(?:^ ?{_V}.*|(?<=[.;,] ){_V} ?)"
    r"(?:[-:(.] ?(?:this is )?(?:correct\b|(?:right|true)(?=[.;,)]|$)|\u2713)|\u2705|\u2714)",
    re.MULTILINE,
)
_CHECKED = re.compile(r"^[ \t]*(?:[-*] )?(?:\[[xX]\]|\u2611\ufe0f?) ", re.MULTILINE)
_UNCHECKED = re.compile(r"^[ \t]*(?:[-*] )?(?:\[ ?\]|\u2610\ufe0f?) .*$\n?", re.MULTILINE)
"""A box that is ticked, as in lists of Markdown, and a line with one that is not."""
_BY_ELIMINATION = re.compile(r"\bby (?:the |a )?(?:process of )?elimination[,:]? ", re.IGNORECASE)
_PLACES = ("first", "second", "third", "fourth", "fifth")
_BY_PLACE = re.compile(rf"\bthe ({'|'.join(_PLACES)}) (option|choice|answer)\b(?! is [\ue000-\ue019])")
"""An option by its place: "The second option is correct."."""
_HEADED = re.compile(rf"\A[^\n:\ue000-\ue019]{{1,30}}: ?{_V}[^\w\ue000-\ue019]*\Z")
_DECIDING = (_SAID, _THUS, _RIGHT, _TICKED, _HEADED)
"""These decide for a letter: words in front of it or behind it, or a heading in any language that is all else."""
_ANY_LETTER = re.compile(r"([\ue000-\ue019])")
_MENTIONED = re.compile(rf"\b(?:answer|option|choice|letter|{_OTHER_ANSWERS}) {_V}")
_ENDING = re.compile(
    r"(?:\b(?:corresponds?(?: to)?|corresponding to|match(?:es|ing)?|aligns? with|indicat(?:es|ing)|suggest(?:s|ing)?"
    r"|point(?:s|ing)? to|support(?:s|ing)?|means|implies|lead(?:s|ing) to|confirms|describes|shows|this is|which is)"
    r"|(?:^|(?<=[.!?] ))(?:[^.!?\n\ue000-\ue019]{1,80}[,:]|maybe|perhaps|possibly))"
    rf",? {_FILL}{_V}(?=[\"'.!)]*(?:$|[.:,] ))"
    rf"|(?:^|(?<=[.!?] ))(?:so )?{_V}"
    r"(?: (?:only|it is|fits|matches|works|applies|remains|is left|would be)|\u9009?\u9879)"
    r"(?=[.!)\u3002]*$)",
    re.MULTILINE,
)
"""A sentence that ends in a letter: "This corresponds to B.", "Based on the video, B."; it counts beside no other."""
_OR = re.compile(
    r"(?:\b(?:or|no|wait|maybe|perhaps|possibly|either|otherwise|could be),?"
    r"|[\ue000-\ue019]\)?(?:,? and|,|\u3001| ?[&/+;]| as well as| ->)"
    rf"|[\u6216\u548c\u4e0e]\u8005?|\u8fd8\u662f) ?{_FILL}{_V}"
)
"""A letter beside the one that is said: "B or A", "B, A"."""
_OPTION = re.compile(r"\A\W*(?:option|choice)\s+(?=\W?[A-Za-z]\W*\Z)", re.IGNORECASE)
_OPTION_AHEAD = re.compile(r"^ ?(?:option|choice) (?=\(?[\ue000-\ue019]\)?(?:[).:,]| - ))", re.MULTILINE)
_CONCEDED = re.compile(
    r"(?:^|(?<=[.!?] ))(?:(?:even )?(?:although|though|if|while|whereas) [^.!?\n,]+, "
    r"|([^.!?\n]*(?:,? but|[,;.] ?however),? ))(?=[^.!?\n]*[\w\ue000-\ue019])",
    re.MULTILINE,
)
"""A sentence grants this before it says something: "Although A seems right, ...", "I am not sure, but ..."."""
_CLAUSE = re.compile(r"(?<=[\ue000-\ue019)]),? (?:because|since|as|although|though|while|whereas) ")
_EXPLAINED = re.compile(
    rf"(?<=[^\s.;:!?]),? {REASON.pattern} [^.;!?\n]{{0,300}}?"  # the bound keeps the time of hostile texts linear
    rf"(?=,? (?:so|thus|therefore|hence|but|while|whereas) |,? and (?:the )?(?:option |answer )?{_L}"
    r"|[.;!?](?!\d)|\n|$)",
    re.MULTILINE,
)
"""The reason behind a statement, up to the next one: "B, because the red car leaves first, and A is wrong"."""
_CORRECTS = re.compile(
    r"\b(?:correction|corrected|revis(?:ed|ion)|actually|meant|sorry|apolog\w+|rather|h+m+|wait|on (?:second|further)"
    r"|on reflection|(?:edit|updated?|final)(?= ?[:-])"
    r"|((?:this|that|it) (?:is|was) (?:wrong|incorrect|false|a mistake)|scratch that|take (?:that|it) back|i was wrong"
    r"|(?:a|my) mistake))\b"
)
"""Where a text corrects itself; the group says that what was before is wrong."""
_ENDS = re.compile(r"[!?;\u3002\n]|[.](?!\d)")
_TURNS = re.compile(
    r"\b(?:no|not|never|neither|nor|none|nobody|nothing|nowhere|cannot|hardly|barely|scarcely|rarely|without"
    r"|lack(?:s|ed|ing)?|absent|missing|unclear|uncertain|unsure|ambiguous|whether|which of|if|unless"
    r"|wrong|incorrect|false|untrue|inaccurate|invalid|impossible|unlikely|improbable|least|worst|doubt\w*"
    r"|suppose|supposing|assum(?:e|ing)|imagine|implausible|contradict\w*|ruled out|eliminated|excluded|dismissed"
    r"|discard\w*|(?:all|any|anything|any [a-z]+|everything) but"
    r"|except|excluding|excludes?|other than|far from|used to|(?:fail|refuse)(?:s|d|ed)? to)\b|n't\b"
    r"|[\u4e0d\u6ca1\u6c92\u65e0\u7121\u975e\u672a\u522b\u5225]"
)
"""A sentence with one of these says something else than that its option is the answer."""
_AFFIRMS = re.compile(
    r"\b(?:without|no|beyond)(?: an?| any| the shadow of a| all)? (?:doubt|question)(?: that)?\b|\bundoubted(?:ly)?\b"
    r"|\bif (?:i|one|we|you)(?: (?:had|have|were|must|could|was|am)\b|'m\b)|\bif (?:forced|pressed|asked)\b"
)
"""These look like it, and say nothing of the kind."""
_TURNED = re.compile(
    rf"(?:{_TURNS.pattern}|\b(?:initially|originally|at first|previous(?:ly)?|earlier"
    r"|almost|nearly|tempting|trap|naive|careless|stop|going to (?:say|choose|pick|select)|first thought"
    r"|would have(?! to))\b)"
    r"(?:(?!\b(?:but|so|then|thus|hence|therefore|because|since)\b)[^,;.!?\n\ue000-\ue019]){0,100}"
    rf"{_V}(?:(?:,? (?:or|and|nor)|,|/) ?{_L})*"
)
"""A letter behind it in the same clause: "the wrong answer is A", "unclear whether it is A", "at first I chose A"."""
_LIST = re.compile(rf"{_L}(?:[,/] ?{_L})+,? (?:or|and|nor) {_L}|{_L}(?:[,/] ?{_L}){{2,}}")
"""Three letters or more in a row: "one of A, B, C, D is correct" says no D."""
_PAIR = re.compile(
    rf"(?:\b(?:options|choices|answers|letters) |^|(?<=[.!?;] )|(?<=tion: )|(?<=reasoning: ))"
    rf"(?:both )?{_L},? (?:and|or|nor) (?:(?:option|choice) )?{_L}"
    r"(?= (?!(?:(?:are|were|seem|look|appear|could|may|might|can|would|should|must)(?: (?!less|not)[a-z]+){0,3}?"
    r" (?:correct|right|true|plausible|possible|likely|valid|answers?|choices?|fit|match|acceptable|best)"
    r"|fit|match)\b)[a-z])",
    re.MULTILINE,
)
"""A sentence about two others says that neither is the answer: "Options A and C happen later."."""
_TIMES = re.compile(
    r"(?<= )(?:frames?|scenes?|images?|pictures?|figures?|shots?|clips?|steps?|seconds?|minutes?|first|last|next|final"
    r"|chapters?|episodes?|versions?|levels?|pages?|parts?)"
    r" \d+(?= )|(?<= )\d+ (?:s|sec|secs|seconds?|min|mins|minutes?|hours?|ms|frames?|fps|percent)(?= )"
)
"""Numbers of a normalised text that count frames and seconds, which an option that is a number alone does not."""
_ONE = re.compile(
    r"(?:(?<=\bis )|(?<=\bare )|(?<=\bwas )|(?<=\bwere )|(?<=\bonly )|(?<=\bjust )|(?<=\bexactly )|(?<=\btotal of )"
    r"|(?<=\bsee )|(?<=\bshows )|(?<=\btakes )|\A\W*(?=\w+(?: \w+){0,2}\W*\Z))"
    r"one\b(?! (?:of|or|another|more|by|after|who|that|side|day)\b)",
    re.IGNORECASE,
)
"""These are the number 1; "the last one" and "one of them" are not."""
_SETTING = re.compile(
    r"(?:^|(?<=[.!?] ))(?:after|before|first|during|while) [^,.!?]+,"
    r"|\b(?:you're|you are|that's|that is|all) right\b|\bright (?:now|away|answer|option|choice)\b",
    re.MULTILINE | re.IGNORECASE,
)
"""Idioms and clauses in front: "After watching it, ..." is no answer "after", and "You're right" none "right"."""
_ALL = re.compile(r"(?:all|both)(?: (?:of )?(?:the )?(?:above|these|them|those|options|answers|choices))?")
"""An option of this kind names the others, which contradict it in no answer."""
_UNPARTED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
_DENY = (
    r"(?:\b(?:not|never|neither|nor|nobody|doubt|unlikely|rather than|instead of|unlike|except|over|versus|vs\.?"
    r"|anything but|cannot|eliminat\w+|exclud\w+|reject\w*|dismiss\w*|rul(?:e|es|ed|ing) out)|n't)"
)
_DENIED_BY = (
    r"(?: (?:(?:is|are|was|were|can|could|would|will|should|seems?|looks?|appears?|does|do|did|has|have)(?:n't\b"
    r"|(?: (?:clearly|also|definitely|probably|most|likely|therefore|both|all|be|simply|the|an?|very|obviously))*"
    r" (?:not|never|no good"
    r"|incorrect|wrong|false|impossible|unlikely|inaccurate|least|worst|ruled out|eliminated|excluded"
    r"|dismissed|rejected|discarded|unsupported|contradicted|irrelevant|implausible)\b)"
    r"|cannot\b|can't\b|(?:fails|contradicts|lacks|ignores|overlooks|misses|exaggerates)\b|is (?:out|a distractor)\b"
    r"|(?:ruled out|excluded|eliminated|rejected|discarded|dismissed)\b)"
    r"|(?:\u9009?\u9879)?(?:\u5747|\u90fd|\u4e5f)?\u662f?(?:\u9519|\u4e0d(?:\u6b63\u786e|\u5bf9|\u7b26\u5408|\u662f))"
    r"|:? ?-* ?\(?(?:(?:incorrect|wrong|false|not|eliminated|ruled out|unlikely|mismatch|impossible|rejected)\b"
    r"|[\u274c\u2717\u00d7]))"
)
_VERDICT = (
    r"(?:[.):;]*(?: -)? (?:no|incorrect|wrong|false)(?=[.;,\n]|$)"
    r"|(?::| -)(?= (?:there is )?(?:no|does not|doesn't)\b))"
)
_FORMULA = re.compile(r"\\f?box(?:ed)?\s*\{([^A-Za-z{}]*|[^{}]*[\\=<>^][^{}]*)\}")
"""A box around a number or a formula, which is the answer only where an option is."""
_OPENS = re.compile(r"\W*(?:yes|no)\b[,.;:]? ", re.IGNORECASE)
_SHORT_ANSWER = re.compile(
    r"\W*(?:yes|no)(?:\W+(?:it|he|she|they|there|that|this|these|those|i|we|you)"
    r" (?:is|are|was|were|does|do|did|has|have|had|can|could|will|would)(?: not)?)?\W*",
    re.IGNORECASE,
)
"""It says "no" or "No, he does not", and nothing of its own."""
_AROUND = " \t\"'`*_()[]{}<>.,;:!?\u3002\u2026"
_BEFORE = re.compile(rf"[{re.escape(_AROUND)}]*?(?=[<>]?\d|[^{re.escape(_AROUND)}]|$)")


_WIDE = r"\u3001\uff09\uff0e\uff1a\u3011"  # signs behind a label that no blank needs to follow
_NUMBERED = re.compile(
    rf"[(\[\uff08\u3010]?(?:([A-Za-z])(?: ?[).:\]{_WIDE}]+\s*|\s+[-\u2013]\s+(?=[^\W\d_]{{2}}))(?![A-Za-z]\.)"
    r"|(\d{1,2})(?: ?(?:[).:\]\uff0e\uff1a]+\s+|[\u3001\uff09\u3011]+\s*)))(?=\S)"
)
"""The letter or the number in front of an option: "A. dog", "(b) dog", "2) dog"."""


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """The question as the language model reads it, options and all. Held by a snapshot in the tests."""
    options = without_labels(options)
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS[: len(options)], options, strict=True))
    return f"{question}\n{listed}\nAnswer with the letter of the right option."


def without_labels(options: Sequence[str]) -> list[str]:
    """Return options without letters or numbers in front, where all have one and these are in order.

    >>> without_labels(["A. dog", "B. cat"]), without_labels(["A. dog", "C. cat"])
    (['dog', 'cat'], ['A. dog', 'C. cat'])
    """
    found = [_NUMBERED.match(option) for option in options]
    if len(options) < 2 or None in found:
        return list(options)
    labels = [(match[1] or match[2]).upper() for match in found]
    orders = (list(LETTERS), [str(n) for n in range(1, 100)], [str(n) for n in range(100)])
    texts = [option[match.end() :] for option, match in zip(options, found, strict=True)]
    in_order = any(labels == order[: len(labels)] for order in orders)
    return texts if in_order and len(set(texts)) > 1 else list(options)


def parse_choice(text: str, options: Sequence[str]) -> int | None:
    """The number of the one option that a text names, by its words, its letter, or both; None where it names none.

    The very words of an option come first, as they are written and then without case, outer blanks and outer
    punctuation; then a letter alone, a plain yes or no, and letters and words inside a sentence. What stands in
    <answer>, a JSON object's "answer" or LaTeX's box is the answer. So is a line that is an option or a letter, and
    "The answer is B." beside sentences that weigh B's words and others'. Alternatives that are denied ("not A") do not
    count. Two different readings are none.

    >>> parse_choice("(B)", ["red", "blue"]), parse_choice("It is blue.", ["red", "blue"])
    (1, 1)
    >>> parse_choice("A red one or a blue one", ["red", "blue"]) is None
    True
    """
    if exact := _words_alone(text, options):  # before tags and labels are looked for: an option may be one
        return _one({*exact, *_letter_alone(text, options)}, options)
    text, *options = (without_latex(written_out(each)) for each in (text, *without_labels(options)))
    if exact := _words_alone(text, options):
        return _one({*exact, *_letter_alone(text, options)}, options)
    text = _FORMULA.sub(lambda box: box[0] if _read(box[1], options) is not None else box[1], without_thoughts(text))
    found = {_read(part, options) for part in wrapped(text)}
    return None if None in found else _one({i for i in found if i is not None}, options)


def _read(text: str, options: Sequence[str]) -> int | None:
    """Return what `parse_choice` does, of a text without tags."""
    text = _without_echo(text, options)
    if (cue := _THINKS.match(text)) and not folded(text[cue.end() :]).startswith(folded(options[0])):
        text = text[cue.end() :]
    if _CHECKED.search(text):
        text = _CHECKED.sub("", _UNCHECKED.sub("", text))
    plain = _HEADING.sub(r"\1: ", without_markup(_BY_ELIMINATION.sub("so ", text)))
    parts = (*plain.splitlines(), *_STATED.split(plain))
    stated = [_ANSWER_LINE.sub("", part, count=1) for part in parts if _ANSWER_LINE.match(part)]
    end = _OPTION.sub("", parts[-1] if parts else "")  # "The man cooks. Option B."
    lines = [line for line in (text, *text.splitlines(), *plain.splitlines(), *stated) if line.strip()]
    marked = _without_own_denial(_marked(plain, options), options)
    if not any(REASON.search(folded(option)) for option in options):
        marked = _EXPLAINED.sub("", marked)
    announced = _WEIGHS.search(marked)  # then a line with an option is an item, unless it says "answer"
    first = announced and _FIRST.match(marked)
    if first:  # "B. Here is each option: ..."
        if _numbers(marked[announced.end() :], *_DECIDING) - _numbers(first[0], _FIRST):
            return None
        marked = marked[: announced.start()]
    weighed = announced is not None and not first
    weighed = weighed and _ITEMS.match(marked, announced.end()) is not None
    marked = _OPTION_AHEAD.sub("", _WEIGHS.sub(" ", marked))
    firsts = [first for line in marked.splitlines() if (first := _FIRST.match(line.strip()))]
    listed = weighed or len({sign for first in firsts for sign in _numbers(first[0], _FIRST)}) > 1
    letters = _numbers(marked, _ANY_LETTER)
    marked = _without_denied(_without_conceded(_AFFIRMS.sub(" ", marked), options), options)
    marked = _PAIR.sub(" ", _LIST.sub(" ", _TURNED.sub(" ", marked)))
    if all(len(option.strip()) == 1 for option in options):  # "(A) B", where B is an option's word
        said = {line.strip().casefold() for line in lines}
        asked = [i for i, labelled in enumerate(_labelled_as_asked(options)) if labelled & said]
        if len(asked) == 1:
            return asked[0]
    alone = {i for line in lines for i in _letter_alone(line, options)}
    last = set(_letter_alone(end, options))
    alone |= last if letters <= last else set()  # of "A is not shown. B" the rest is cut off
    alone |= {i for line in (stated if weighed else lines) for i in _words_alone(line, options)}
    if not alone and not weighed and (said := _polarity(plain, options)) is not None:
        return said if _numbers(marked, _ANY_LETTER) <= {said} else None
    if not listed:
        alone |= {i for line in marked.splitlines() for i in _labelled(line, options)}
    if alone:
        said = {n for n in _decided(marked) or _numbers(marked, _OR) if n < len(options)}
        found = _one(alone | said, options)
    else:
        found = _inside(marked, options, listed)
    return None if found is None or _is_taken_back(marked, found, options) else found


def _is_taken_back(text: str, number: int, options: Sequence[str]) -> bool:
    """Return True where a marked text corrects itself, and names another option then or says only that it was wrong."""
    own = [folded(option) for option in options]
    found = _CORRECTS.finditer(text)
    match = next((m for m in found if not m[1] or m[1].rpartition(" ")[2] not in own), None)
    after = text[match.end() :] if match else ""
    named = {n for n in (*_numbers(after, _ANY_LETTER), *_options_in(after, options)) if n < len(options)}
    same = {n for n in named if folded(options[n]) == folded(options[number])}
    return match is not None and (named != same or (match[1] is not None and not same))


def _without_echo(text: str, options: Sequence[str]) -> str:
    """Return the text without lines that only list every option with its letter, as they were asked."""
    lines, labelled = text.splitlines(), set().union(*_labelled_as_asked(options))
    listed = [line.strip().casefold() in labelled for line in lines]
    if len(options) < 2 or sum(listed) < len(options):
        return text
    return "\n".join(line for line, drop in zip(lines, listed, strict=True) if not drop)


def _labelled_as_asked(options: Sequence[str]) -> list[set[str]]:
    """Each option with its letter, as questions list them, in lower case."""
    forms = ("({}) {}", "{}. {}", "{}) {}", "{}: {}")
    return [
        {form.format(letter, option).casefold() for form in forms}
        for letter, option in zip(LETTERS, options, strict=False)
    ]


def _one(found: Collection[int], options: Sequence[str]) -> int | None:
    """The first of options that say the same; None of options that differ."""
    return min(found) if len({folded(options[i]) for i in found}) == 1 else None


def _words_alone(text: str, options: Sequence[str]) -> list[int]:
    """Return the options that are all of the text, in the strictest of five comparisons that any option passes."""
    for same in (str.strip, folded, _bare, _normalised, _in_digits):
        if (key := same(text)) and (found := [i for i, option in enumerate(options) if same(option) == key]):
            return found
    return []


def _bare(text: str) -> str:
    """Without outer blanks, punctuation and brackets; a sign in front of a number stays."""
    text = written(folded(text))
    return text[_BEFORE.match(text).end() :].rstrip(_AROUND)


def _normalised(text: str, numbers: Callable[[str], str] = written) -> str:
    """`normalise` of a text without a letter of its own in front or behind, which would pass for an article."""
    words, plain = normalise(text, numbers), without_markup(text)
    return "" if _LONE.fullmatch(words) or _LABEL.match(plain) or _LABEL_BEHIND.search(plain) else words


def _in_digits(text: str) -> str:
    """Return `_normalised` with numbers in digits: options are "3", and models write "Three"."""
    return _normalised(text, counted)


def _in_text(text: str) -> str:
    """Return `normalise` with numbers in digits but a lone "one", which stands for too much."""
    return normalise(text, functools.partial(counted, one=False))


def _letter_alone(text: str, options: Sequence[str]) -> list[int]:
    """The option whose letter is all of the text."""
    match = _LONE.fullmatch(without_markup(text)) or _LONE.fullmatch(text.strip())
    number = LETTERS.index(match.group(1).upper()) if match else len(options)
    return [number] if number < len(options) else []


def _polarity(text: str, options: Sequence[str]) -> int | None:
    """The option yes or no that a text says in a sentence, as the rules of `lavis-lstp judge` read it."""
    said = yes_or_no(text)
    kinds = [yes_or_no(option) if len(option.split()) == 1 else None for option in options]
    if said not in kinds and _SHORT_ANSWER.fullmatch(text):
        kinds = [yes_or_no(option) if _OPENS.match(option) else None for option in options]
        if kinds.count(said) > 1:
            return None
    meant = [i for i, kind in enumerate(kinds) if kind is not None and kind is said]
    named = {i for i in _options_in(text, options) if kinds[i] is None}  # "no" in "there are no people" is no answer
    return _one(meant, options) if meant and not named else None


def _marked(text: str, options: Sequence[str]) -> str:
    """Return the text in lower case, with characters of private use for letters that stand for an option."""
    own = {
        place
        for option in options
        if len(option) > 1 and _LETTER.search(option)  # the letter of "plan B" is a word's
        for match in re.finditer(re.escape(option), text, re.IGNORECASE)
        for place in range(*match.span())
    }

    begin = [option[:2] for option in options]  # in EgoSchema, C is the one who wears the camera

    def mark(match: re.Match) -> str:
        if match.start() in own and match.end() - 1 in own:
            return match[0]
        if begin.count(f"{match[0]} ") > 1 and _ACTS.match(text, match.end()):
            return match[0]
        sign = chr(_MARK + LETTERS.index(match[match.lastindex].upper()))
        return f"({sign})" if match[1] else sign

    text = re.sub(r"[\ue000-\uf8ff]", " ", text)
    text = re.sub(r"[ \t]+", " ", _LETTER.sub(mark, text).lower())
    return _BY_PLACE.sub(lambda match: f"{match[2]} {chr(_MARK + _PLACES.index(match[1]))}", text)


def _without_own_denial(text: str, options: Sequence[str]) -> str:
    """Drop the words of an option beside its letter where they deny something: "(D) Not sure" denies no D."""
    for i, option in enumerate(options):
        words = _bare(option)
        if _TURNS.search(words) and text.find(words) >= 0:
            letter, words = chr(_MARK + i), re.escape(words)
            ahead = rf"\(?{letter}\)?[).:,]*(?: -)? ?[(\"']?{words}(?!\w)[)\"']?"
            behind = rf"(?<!\w){words}[.,:\"']* ?-? ?\(?(?:(?:option|choice|answer) )?{letter}\)?"
            text = re.sub(rf"{ahead}|{behind}", f"({letter})", text)
    return text


def _numbers(text: str, *patterns: re.Pattern) -> set[int]:
    """Return the numbers of the letters that the patterns find in a marked text."""
    return {ord(match[match.lastindex]) - _MARK for pattern in patterns for match in pattern.finditer(text)}


def _decided(text: str) -> set[int]:
    """Return the numbers of the letters that a marked text decides for, and of those that it puts beside them."""
    starts = [match.start() for pattern in _DECIDING for match in pattern.finditer(text)]
    return _numbers(text, *_DECIDING) | _numbers(text[min(starts) :], _OR) if starts else set()


def _without_conceded(text: str, options: Sequence[str]) -> str:
    """Drop from a marked text what it grants, but for "not A, but ..." and what else names an option before "but"."""

    def kept(match: re.Match) -> str:
        said = match[1] and (_numbers(match[1], _ANY_LETTER) or _options_in(match[1], options))
        return match[0] if said or (match[1] and not _TURNS.search(match[1].rpartition("but")[0] or match[1])) else ""

    return _CONCEDED.sub(kept, text)


def _without_denied(text: str, options: Sequence[str]) -> str:
    """Drop from a marked text what it says is not the answer: "not A", "rather than a dog", "B and C are wrong"."""
    if not re.search(rf"{_DENY}|{_DENIED_BY}|{_VERDICT}", text):
        return text
    names_verdict = any(
        yes_or_no(option) is False or folded(option) in ("false", "wrong", "incorrect") for option in options
    )
    words = [re.escape(folded(option)) for option in options]
    letters = [rf"\(?{chr(_MARK + i)}\)?(?:[.:]? {word}(?!\w)|{_BESIDE})?" for i, word in enumerate(words)]
    items = "|".join([*letters, _L])
    listed = rf"(?:{items})(?:(?:,? (?:and|or|nor)|,|/|\u3001|\u548c) ?(?:option )?(?:{items}))*"
    spoken = "|".join(sorted((word for word in words if word), key=len, reverse=True))
    spoken = rf"(?:{spoken})(?!\w|[.,:/-]\d)(?: {_L})?"
    helpers = (
        r"(?: (?:think|believe|say|be|that|it|it's|is|the|an?|options?|choice|answer|correct|choose|go|going|to|would"
        r"|with|both))*"
    )
    denied_by = _DENIED_BY if names_verdict else f"(?:{_DENIED_BY}|{_VERDICT})"
    denied_by = rf"(?!\W*not{helpers} (?:{_L}|{spoken})){denied_by}"  # "B (not A)" denies no B
    text = re.sub(
        rf"((?:\b(?:is|be|chose|choose|pick|select)|[:=]) ?{_L}),?(?: and)? {listed}{denied_by}", r"\1. ", text
    )
    text = re.sub(rf"{listed}{denied_by}", " ", text)
    denied = listed
    if not any(re.search(_DENY, folded(option)) for option in options):
        denied = rf"(?:{listed}|{spoken}(?:(?:, {spoken})*,? (?:or|nor|and) {spoken})?)"
    return re.sub(rf"(?:,? (?:and|but))? ?{_DENY}{helpers},? {denied}(?:,? but(?= ))? ?", " ", text).strip()


def _labelled(line: str, options: Sequence[str]) -> list[int]:
    """Return the option whose letter and words are all of a marked line, or of its first sentence."""
    first = re.match(rf" *{_V}[).:,;\u3001\u3002]* ?(?:- )?(.+?)(?:[.!?\u3002](?= |$)|$)", line)
    number = ord(first[1]) - _MARK if first else len(options)
    same = number < len(options) and any(
        _bare(text) == _bare(options[number]) for text in (first[2], line[first.start(2) :])
    )
    return [number] if same else []


def _inside(text: str, options: Sequence[str], listed: bool) -> int | None:
    """Return the option that a marked text names: by a letter in front, one that it decides for, or by words.

    Of options that are `listed` and weighed only what decides names one.
    """
    first = None if listed else _FIRST.match(text) or _BELOW.search(text)
    said = [match for pattern in _DECIDING for match in pattern.finditer(text)]
    rest = text[: first.start()] + text[first.end() :] if first else text
    if first:
        numbers = _numbers(first[0], _FIRST)
        others = _numbers(rest, _MORE, _OR, *_DECIDING)
        # a letter that no option has is a word's: "A. in the U.S."
        numbers |= {number for number in others if number < len(options)}
    elif said:
        numbers = _decided(text)
    else:
        numbers = set() if listed else _numbers(text, _MENTIONED)
        if not listed and not numbers and len(_numbers(text, _ANY_LETTER)) == 1:
            numbers = _numbers(text, _ENDING)
        numbers |= _numbers(text, _OR) if numbers else set()
    named = _options_in(rest, options)
    if not numbers:
        if listed or len(named) != 1 or _denied(rest, options[named[0]]) or _numbers(text, _ANY_LETTER) - set(named):
            return None
        if text.rstrip().endswith("?"):  # "Is it the kitchen?"
            return None
        # "no" in "there is no doubt" is no answer no
        plain = len(options[named[0]].split()) == 1 and yes_or_no(options[named[0]]) is not None
        return None if plain and not normalise(rest).endswith(normalise(options[named[0]])) else named[0]
    if len(numbers) > 1 or (number := min(numbers)) >= len(options):
        return None
    if any(folded(option) == LETTERS[number].lower() for i, option in enumerate(options) if i != number):
        return None
    if said and not first:  # "A shows red, B blue. The answer is B.": other sentences contradict nothing
        ends = [0, *(match.end() for match in _ENDS.finditer(text)), len(text)]
        places = sorted({bisect.bisect_right(ends, match.start(match.lastindex)) for match in said})
        behind = [_ENDS.split(text[match.end() :].lstrip(" .)"), maxsplit=1)[0] for match in said]
        if any(i != number for words in behind for i in _words_alone(words, options)):  # "The answer is C. Blue"
            return None
        named = _options_in(" ".join(_CLAUSE.split(text[ends[i - 1] : ends[i]])[0] for i in places), options)
    elif first and _begins_with(rest, options[number]):  # "C. A child plays with a dog."
        named = [number]
    elif first and number in (beside := _options_in(_ENDS.split(rest, maxsplit=1)[0], options)):
        named = beside
    if len(named) > 1 and _ALL.fullmatch(folded(options[number])):
        return number
    # words that are another option's contradict the letter
    return number if all(folded(options[i]) == folded(options[number]) for i in named) else None


def _without_blanks(words: str) -> str:
    """Words of a script that parts none by blanks, without those around them; others as they are."""
    return words.strip() if _UNPARTED.search(words) else words


def _begins_with(text: str, option: str) -> bool:
    """Return True where a text begins with an option's words, and none is put beside them."""
    words, start = _in_text(text), _in_text(option)
    return bool(start) and re.match(rf"{re.escape(start)}(?:$| (?!or\b|and\b|[&/]))", words) is not None


def _denied(text: str, option: str) -> bool:
    """Return True where a text says "not" or the like, and its option does not: "it is not red".

    Of other sentences than those that name the option only what says that this is wrong or unsure counts.
    """
    sentences = [folded(part) for part in _ENDS.split(_AFFIRMS.sub(" ", text))]
    naming = [part for part in sentences if _options_in(part, [option])]
    about = [part for part in sentences if not naming or part in naming or DENIES_ANOTHER.search(part)]
    return len(_TURNS.findall(". ".join(about))) > len(_TURNS.findall(folded(option))) * max(1, len(naming))


def _options_in(text: str, options: Sequence[str]) -> list[int]:
    """Return the options whose words stand in a text, but for those that are a part of a longer one that does.

    Of options that say the same, the first. Numbers count in digits and words alike, and as a whole only.
    """
    if any(re.search(r"\b1\b", option) for option in options) and not any("one" in folded(o).split() for o in options):
        text = _ONE.sub("1", text)
    words, *plain = (f" {_in_text(part)} " for part in (text, *options))
    counts, said = _TIMES.sub("", words), f" {_in_text(_SETTING.sub(' ', text))} "
    within = [counts if option.strip().isdigit() else words if " " in option.strip() else said for option in plain]
    found = [i for i, option in enumerate(plain) if option.strip() and _without_blanks(option) in within[i]]
    whole = [i for i in found if _ALL.fullmatch(folded(options[i]))]
    others = [option for option in options if not _TURNS.search(folded(option))]
    if whole and (" " in options[whole[0]].strip() or len(found) == len(others)):  # "both" may be another word's
        found = whole
    longest = [i for i in found if not any(plain[i] in plain[j] and plain[i] != plain[j] for j in found)]
    return list({folded(options[i]): i for i in reversed(longest)}.values())[::-1]
