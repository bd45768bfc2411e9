"""How the questions of test files are scored."""

import pytest

from apexlib.text.corpora import ARITHMETIC, LOSS_ONLY, final_answer, scored


def conversation(asked, told):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]


def test_a_letter_becomes_the_text_that_a_model_is_trained_to_answer_with():
    for letter, text in zip("ABC", ("odd", "even", "neither"), strict=True):
        messages = conversation("1\nA. odd\nB. even\nC. neither", f"{letter}. {text}")
        row = {"task": "arc_easy", "id": 1, "messages": messages}
        found = scored(row | {"answer": letter, "choices": ["odd", "even", "neither"]})
        assert found["answer"] == messages[-1]["content"]
        assert found == {
            "messages": messages,
            "family": "arc_easy",
            "answer": f"{letter}. {text}",
            "choices": ["A. odd", "B. even", "C. neither"],
        }


CHEMISTRY = ["C", "NO2", "O2", "CO"]


def test_where_a_choice_is_a_letter_what_the_assistant_says_tells_which_is_meant():
    lettered = {"task": "arc", "answer": "C", "choices": CHEMISTRY, "messages": conversation("which?", "C. O2")}
    assert scored(lettered)["answer"] == "C. O2"
    plain = lettered | {"messages": conversation("which?", "C")}
    assert scored(plain)["answer"] == "C"
    assert scored(plain)["choices"] == CHEMISTRY
    unsaid = lettered | {"messages": conversation("which?", "carbon")}
    with pytest.raises(ValueError, match=r"arc: answer 'C' is a letter and a choice.*'carbon', need 'C\. O2' or 'C'"):
        scored(unsaid)


def test_choices_that_name_their_answer_stay_as_they_are():
    row = {"task": "boolq", "messages": [], "answer": "true", "choices": ["true", "false"]}
    assert scored(row) == {"messages": [], "family": "boolq", "answer": "true", "choices": ["true", "false"]}


@pytest.mark.parametrize("task", ARITHMETIC)
def test_small_arithmetic_sets_are_one_family(task):
    messages = conversation("1 + 1", "1 + 1 = 2\n#### 2")
    assert scored({"task": task, "messages": messages, "answer": "2"}) == {
        "messages": messages,
        "family": "arithmetic",
        "answer": "2",
    }


def test_of_some_only_the_loss_is_measured():
    messages = conversation("what is 3?", "it is\n#### 3")
    for row in ({"task": LOSS_ONLY[0], "answer": "3"}, {"task": LOSS_ONLY[0]}):
        assert scored(row | {"messages": messages}) == {"messages": messages, "family": LOSS_ONLY[0]}
    assert scored({"messages": messages}) == {"messages": messages, "family": "other"}


def test_the_answer_of_a_text_is_what_follows_its_last_mark_or_all_of_it():
    assert final_answer("1 + 1 = 2\n#### 2 ") == "2"
    assert final_answer(" two") == "two"


def test_a_letter_that_is_a_choice_too_needs_somebody_who_says_which():
    with pytest.raises(ValueError, match="'A' is a letter and a choice; the assistant says ''"):
        scored({"task": "arc_easy", "messages": [], "answer": "A", "choices": ["b", "A"]})


def test_an_answer_that_no_choice_has_is_refused():
    with pytest.raises(ValueError, match="'C' is neither one of the choices"):
        scored({"task": "arc_easy", "messages": [], "answer": "C", "choices": ["a", "b"]})
