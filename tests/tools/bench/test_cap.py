"""What `llada bench cap` concludes from answers, and what counts as an answer in the format."""

import pytest

from llada_megatron.llada_moe.data.generated_chats import generated_chats, in_format, new_questions
from llada_megatron.tools.bench import cap
from llada_megatron.tools.bench.word_questions import Answers


def answers(right, tokens_per_forward):
    return Answers(100, 100, right, round(100 * tokens_per_forward), 100, ())


@pytest.mark.parametrize(
    ("confident", "ratio"),
    [
        ([answers(80, 1.5), answers(78, 3.0), answers(77, 9.0)], 1.5),  # the last one is not equal any more
        ([answers(90, 1.5), answers(40, 8.0)], 0.75),
        ([answers(10, 9.0)], 0.0),
    ],
)
def test_speeds_are_compared_at_equal_accuracy(confident, ratio):
    without = [answers(80, 1.0), answers(79, 2.0), answers(60, 5.0)]
    claim, *_ = cap.claims({cap._WITHOUT: without, cap._WITH: confident})
    assert claim.value == pytest.approx(ratio) and claim.holds is (ratio >= cap.GOAL)


def test_table_and_picture_show_each_threshold(tmp_path):
    found = {name: [answers(80 - n, 1.0 + n) for n in range(len(cap.THRESHOLDS))] for name in (cap._WITHOUT, cap._WITH)}
    lines = cap.table(found).splitlines()
    assert len(lines) == 1 + len(cap.THRESHOLDS)
    assert lines[2].split() == ["0.9", *["2.00", "79.0", "%", "100.0", "%"] * 2]
    cap.draw(tmp_path / "cap.png", found)
    assert (tmp_path / "cap.png").stat().st_size > 1000


def test_new_questions_are_about_words_that_were_never_trained_on():
    questions = new_questions(50)
    said = {word for chat in generated_chats() for m in chat for word in m["content"].lower().rstrip(".?").split()}
    assert not {question.word for question in questions} & said
    assert all(in_format(question.answer) and question.word in question.text for question in questions)
    assert {q.answer.removeprefix("Answer: ")[:-1].isdigit() for q in questions} == {True, False}
    for text in ("answer: a.", "Answer: a", "Answer: a b.", "Answer: .", "Answer: a. Answer: b.", "Answer: a.\n", ""):
        assert not in_format(text)
