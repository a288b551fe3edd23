"""Plans: what is read, what is refused, and that text and plan say the same."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddecode.plan import Plan, Span, check_plan, parse_plan, student_plan


@pytest.mark.parametrize(
    "text",
    [
        "student:0-16",
        "student:0-16,student:4-16",
        "student:0-4,teacher:4-8,student:8-16",
        "student:0-12,teacher:4-8,student:4-16",
        "small:0-8,large_2-b:8-16",
        "teacher:0-16,student:0-16",
    ],
)
def test_plans_are_read(text: str) -> None:
    plan = parse_plan(text, 16)
    assert str(plan) == text
    assert plan.length == 16 and plan.spans[-1].stop == 16


def test_blanks_around_spans_do_not_matter() -> None:
    assert parse_plan(" student:0-8 , teacher:8-16 ", 16) == parse_plan("student:0-8,teacher:8-16", 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "who:start-stop"),
        ("student", "who:start-stop"),
        ("student:0", "who:start-stop"),
        ("student:0-16,", "who:start-stop"),
        ("student:-4-16", "who:start-stop"),
        ("student:0-1.5", "who:start-stop"),
        ("student 0-16", "who:start-stop"),
        (":0-16", "who:start-stop"),
        ("student:0-4,student:8-16", "student:8-16 leaves a gap: only 4"),
        ("student:4-16", "leaves a gap: only 0"),
        ("student:0-16,student:4-8,student:9-16", "leaves a gap: only 8"),
        ("student:0-8", "ends at 8, the sequence has 16"),
        ("student:0-16,student:0-8", "ends at 8"),
        ("student:0-17", "0 <= start < stop <= 16"),
        ("student:0-0,student:0-16", "0 <= start < stop"),
        ("student:0-8,student:8-4,student:4-16", "0 <= start < stop"),
    ],
)
def test_plans_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_plan(text, 16)


def test_a_plan_needs_a_span() -> None:
    with pytest.raises(ValueError, match="at least one span"):
        Plan(spans=(), length=16)


def test_unknown_models_and_starts_are_refused_naming_those_known() -> None:
    starts = {"student": (0, 4), "teacher": None}
    check_plan(parse_plan("student:0-16,teacher:3-9,student:4-16", 16), starts)
    with pytest.raises(ValueError, match="no model 'oracle'; there are student, teacher"):
        check_plan(parse_plan("oracle:0-16", 16), starts)
    with pytest.raises(ValueError, match=r"student was not trained to start at 5; it knows \[0, 4\]"):
        check_plan(parse_plan("student:0-16,student:5-16", 16), starts)


def test_the_default_plan_takes_the_students_starts_in_turn() -> None:
    assert str(student_plan(1, (0, 4, 9), 16)) == "student:0-16"
    assert str(student_plan(3, (0, 4, 9), 16)) == "student:0-16,student:4-16,student:9-16"
    for passes in (0, -1, 4):
        with pytest.raises(ValueError, match="samples in 1 to 3 steps"):
            student_plan(passes, (0, 4, 9), 16)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    length, resolved, spans = draw(st.integers(1, 300)), 0, []
    name = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,6}", fullmatch=True)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, min(resolved, length - 1)))
        resolved = draw(st.integers(start + 1, length))
        spans.append(Span(who=draw(name), start=start, stop=resolved))
    spans.append(Span(who=draw(name), start=draw(st.integers(0, min(resolved, length - 1))), stop=length))
    return Plan(spans=tuple(spans), length=length)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(plans())
def test_text_and_plan_say_the_same(plan: Plan) -> None:
    assert parse_plan(str(plan), plan.length) == plan


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.text(alphabet="student:0123456789-, ", max_size=40), st.integers(1, 20))
def test_any_text_is_a_whole_plan_or_refused(text: str, length: int) -> None:
    try:
        plan = parse_plan(text, length)
    except ValueError:
        return
    resolved = 0
    for span in plan.spans:
        assert 0 <= span.start <= resolved and span.start < span.stop <= length
        resolved = span.stop
    assert resolved == length
