"""Sampling plans: which model emits which span of token positions.

`student:0-256,student:80-256` reads: the student emits all tokens, then keeps its first 80 and, with the original
noise after them, emits the rest again. Teacher-involved sampling, the stitching of small and large models (T-Stitch,
arXiv 2402.14167; CoDe, arXiv 2411.17787) and the control that skips the last tokens (`teacher:0-200,skip:200-256`) are
plans as well.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddecode.arguments import MOST, check_kind, check_whole, shown

NAME = re.compile(r"[A-Za-z][\w-]*")
SPAN = re.compile(rf"(?P<who>{NAME.pattern}):(?P<start>[0-9]{{1,9}})-(?P<stop>[0-9]{{1,9}})")


@dataclass(frozen=True, kw_only=True)
class Span:
    """Positions `start` (tokens resolved before it) to `stop`, emitted by the model named `who`.

    Raises:
        ValueError: the name is no text, or a position no whole number.
    """

    who: str
    start: int
    stop: int

    def __post_init__(self) -> None:
        check_kind("a span's who", self.who, str)
        check_whole("a span's start", self.start, -MOST)
        check_whole("a span's stop", self.stop, -MOST)

    def __str__(self) -> str:
        return f"{self.who}:{self.start}-{self.stop}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Spans in order. No gap, and the last one ends at `length`.

    Raises:
        ValueError: the spans leave a gap, are empty or do not end at `length`.
    """

    spans: tuple[Span, ...]
    length: int

    def __post_init__(self) -> None:
        check_whole("a plan's length", self.length, 1)
        resolved = 0
        if not isinstance(self.spans, Sequence) or not all(isinstance(span, Span) for span in self.spans):
            raise ValueError(f"a plan's spans must be a tuple of Span, got {shown(self.spans)}")
        if not self.spans:
            raise ValueError("a plan needs at least one span who:start-stop")
        for span in self.spans:
            if not 0 <= span.start < span.stop <= self.length:
                raise ValueError(f"plan span {span}: positions must satisfy 0 <= start < stop <= {self.length}")
            if span.start > resolved:
                raise ValueError(f"plan span {span} leaves a gap: only {resolved} tokens are resolved before it")
            resolved = span.stop
        if resolved != self.length:
            raise ValueError(f"the plan ends at {resolved}, the sequence has {self.length} tokens")

    def __str__(self) -> str:
        return ",".join(map(str, self.spans))


def parse_plan(text: str, length: int) -> Plan:
    """Read `who:start-stop,...` for sequences of `length` tokens.

    Raises:
        ValueError: the text is no plan, or `Plan` refuses it.
    """
    if not isinstance(text, str):
        raise ValueError(f"a plan must be text, got {shown(text)}")
    spans = []
    for part in text.split(","):
        match = SPAN.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"plan span {shown(part.strip())} must read who:start-stop, as in student:0-{length}")
        spans.append(Span(who=match["who"], start=int(match["start"]), stop=int(match["stop"])))
    return Plan(spans=tuple(spans), length=length)


def student_plan(passes: int, starts: Sequence[int], length: int) -> Plan:
    """The default plan of a student with so many passes: one from each of its first starts.

    Raises:
        ValueError: fewer than one pass, or more than the student has starts.
    """
    if not 1 <= passes <= len(starts):
        raise ValueError(
            f"this student samples in 1 to {len(starts)} steps (it was trained for starts {list(starts)}), "
            f"not in {passes}; a plan can bring in the teacher"
        )
    return Plan(spans=tuple(Span(who="student", start=s, stop=length) for s in starts[:passes]), length=length)


def check_plan(plan: Plan, starts: Mapping[str, Sequence[int] | None]) -> None:
    """Refuse a plan that names a model or a start that is not there.

    Args:
        plan: the plan.
        starts: by model name, the starts it may take; None is any.

    Raises:
        ValueError: naming what is known.
    """
    for span in plan.spans:
        if span.who not in starts:
            raise ValueError(f"plan span {span}: no model {span.who!r}; there are {', '.join(starts)}")
        known = starts[span.who]
        if known is not None and span.start not in known:
            raise ValueError(
                f"plan span {span}: {span.who} was not trained to start at {span.start}; it knows {list(known)}"
            )
