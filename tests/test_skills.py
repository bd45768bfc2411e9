"""Skills: every answer against an independent solver, splits that share nothing, the same tasks everywhere."""

import re
from collections import Counter, defaultdict
from datetime import date, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apexlib.files import content_hash
from apexlib.text.skills import FAMILIES, SPLITS, skills, skills_text, split_of

MONTHS = ["January", "February", "March", "April", "May", "June", "July"]
MONTHS += ["August", "September", "October", "November", "December"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def numbers(prompt):
    return [int(found) for found in re.findall(r"\d+", prompt)]


def words_after_colon(prompt):
    return prompt.rstrip(".?").split(": ", 1)[1].split()


def asked_word(prompt, pattern):
    return re.search(pattern, prompt).group(1)


def solve_reverse(prompt):
    answer = []
    for word in words_after_colon(prompt):
        answer.insert(0, word)
    return " ".join(answer)


def solve_sort(prompt):
    left, answer = numbers(prompt.split(":")[1]), []
    while left:
        answer.append(left.pop(left.index(min(left))))
    return " ".join(map(str, answer))


def solve_count(prompt):
    word = asked_word(prompt, r"(?:times is|Count) (\w+) in")
    return str(sum(other == word for other in words_after_colon(prompt)))


def solve_arithmetic(prompt):
    total = 0
    for sign, number in re.findall(r"([+-]?) ?(\d+)", prompt):
        total += -int(number) if sign == "-" else int(number)
    return str(total)


def solve_compare(prompt):
    ordered = sorted(numbers(prompt))
    return str(ordered[-1] if "largest" in prompt else ordered[0])


def solve_lookup(prompt):
    word = asked_word(prompt, r"what is (\w+)\?|Look up (\w+) in") or asked_word(prompt, r"Look up (\w+) in")
    return re.search(rf"\b{word}=(\d+)", prompt).group(1)


def solve_calendar(prompt):
    n, unit, side, start = re.search(r"(\d+) (day|month)s? (after|before) ([A-Z]\w+(?: \d+)?)", prompt).groups()
    sign = 1 if side == "after" else -1
    if start in DAYS:
        assert unit == "day"
        return DAYS[(DAYS.index(start) + sign * int(n)) % 7]
    if unit == "month":
        return MONTHS[(MONTHS.index(start) + sign * int(n)) % 12]
    month, day = start.split()
    answers = set()
    for year in (2023, 2024):  # the answer must not depend on a leap year
        end = date(year, MONTHS.index(month) + 1, int(day)) + timedelta(days=sign * int(n))
        answers.add(f"{MONTHS[end.month - 1]} {end.day}")
    (answer,) = answers
    return answer


def solve_membership(prompt):
    word = asked_word(prompt, r"(?:Is|have) (\w+)(?: in)?:")
    return "yes" if word in words_after_colon(prompt) else "no"


def solve_case(prompt):
    style = asked_word(prompt, r"(capitals|lower case|title case)")
    words = words_after_colon(prompt)
    if style == "capitals":
        return " ".join(word.upper() for word in words)
    if style == "lower case":
        return " ".join(word.lower() for word in words)
    return " ".join(word[0].upper() + word[1:].lower() for word in words)


def solve_format(prompt):
    words = words_after_colon(prompt)
    if "day/month/year" in prompt:
        year, month, day = words[0].split("-")
        return f"{day}/{month}/{year}"
    if "value=word" in prompt:
        return " ".join("=".join(reversed(pair.split("="))) for pair in words)
    return {"dashes": "-", "commas": ",", "slashes": "/"}[asked_word(prompt, r"with (\w+)")].join(words)


def solve_sequence(prompt):
    *_, a, b, c = found = numbers(prompt.replace("with one number", ""))
    if len(found) == 4:
        assert found[0] + found[1] == found[2]
        assert a + b == c
        return str(b + c)
    assert c - b == b - a
    return str(2 * c - b)


def solve_position(prompt):
    words = words_after_colon(prompt)
    ordinal = asked_word(prompt, r"the (.*?) word")
    index = ["first", "second", "third", "fourth"].index(ordinal.split()[0]) if ordinal != "last" else 0
    return words[-1 - index] if ordinal.endswith("last") else words[index]


def solve_remove(prompt):
    word = asked_word(prompt, r"(?:Remove|out) (\w+)")
    return " ".join(other for other in words_after_colon(prompt) if other != word)


SOLVERS = {name.removeprefix("solve_"): solver for name, solver in globals().items() if name.startswith("solve_")}
SOLVERS["copy"] = lambda prompt: prompt.split(": ", 1)[1].removesuffix(".")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_what_an_independent_solver_finds(family, split):
    tasks = skills(split, 120, seed=3, families=[family])
    for task in tasks:
        (question, answer) = task["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert SOLVERS[family](question["content"]) == answer["content"] == task["answer"]
        assert task["family"] == family
    assert Counter(task["difficulty"] for task in tasks) == {1: 40, 2: 40, 3: 40}


def test_there_are_ten_families_or_more_with_two_phrasings_or_more():
    opening = defaultdict(set)
    for task in skills("train", 42 * 8):
        opening[task["family"]].add(task["messages"][0]["content"].split()[0])
    assert len(opening) >= 10
    assert all(len(found) >= 2 for found in opening.values())


def content_of(task):
    """What a task asks, without its phrasing: the answer and the words and numbers of the prompt that vary."""
    prompt = task["messages"][0]["content"]
    fixed = {"copy": ": ", "reverse": ": ", "sort": ": "}.get(task["family"])
    return (task["family"], prompt.split(fixed)[-1].rstrip(".?") if fixed else prompt, task["answer"])


def test_splits_share_no_task_under_any_seed_or_phrasing():
    found = {
        split: {content_of(task) for seed in range(4) for task in skills(split, 800, seed=seed)} for split in SPLITS
    }
    assert all(len(contents) > 800 for contents in found.values())  # seeds do differ
    assert not found["train"] & found["test"]
    assert not found["train"] & found["valid"]
    assert not found["valid"] & found["test"]


def test_both_phrasings_of_a_test_task_are_kept_from_train():
    held_out = {content_of(task)[1] for task in skills("test", 140, families=["reverse"], difficulties=[1])}
    train = {content_of(task)[1] for task in skills("train", 1200, families=["reverse"], difficulties=[1])}
    assert not held_out & train


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**40), n=st.integers(1, 150), split=st.sampled_from(SPLITS))
def test_tasks_are_distinct_reproducible_and_grow_from_the_front(seed, n, split):
    tasks = skills(split, n, seed=seed)
    prompts = [task["messages"][0]["content"] for task in tasks]
    assert len(prompts) == len(set(prompts)) == n
    assert tasks == skills(split, n, seed=seed)
    assert tasks == skills(split, n + 17, seed=seed)[:n]


def test_no_prompt_is_part_of_another_task():
    for seed in range(3):
        prompts = [task["messages"][0]["content"] for task in skills("train", 3000, seed=seed)]
        assert len(set(prompts)) == 3000
    text = "\n".join(prompts)
    assert not [prompt for prompt in prompts if text.count(prompt) > 1]


def test_leaving_a_family_out_keeps_the_tasks_of_the_others():
    both = skills("valid", 40, families=["copy", "count"], difficulties=[2])
    alone = skills("valid", 20, families=["count"], difficulties=[2])
    assert [task for task in both if task["family"] == "count"] == alone


def test_tasks_are_the_same_on_every_platform():
    assert content_hash(skills("test", 420, seed=7))[:16] == "92d4b8f8a567afdf"


def test_prompts_and_answers_are_short():
    tasks = skills("train", 2000)
    assert max(len(task["messages"][0]["content"]) for task in tasks) <= 100
    assert max(len(task["answer"]) for task in tasks) <= 50


def test_no_answer_is_right_too_often():
    """The best constant answer of a family stays far from solving it."""
    answers = defaultdict(Counter)
    for task in skills("test", 1500):
        answers[task["family"]][task["answer"]] += 1
    share = {family: max(found.values()) / found.total() for family, found in answers.items()}
    assert share.pop("membership") < 0.6
    assert max(share.values()) < 0.35


def test_raw_text_holds_train_tasks_only():
    assert skills_text(1)[0].startswith("Say exactly this: fox wind.\nfox wind\n\n")
    text = "\n\n".join(skills_text(600, seed=5))
    held_out = [task["messages"][0]["content"] for split in ("valid", "test") for task in skills(split, 2000, seed=5)]
    assert not [prompt for prompt in held_out if prompt in text]
    blocks = text.split("\n\n")
    train = [f"{task['messages'][0]['content']}\n{task['answer']}" for task in skills("train", 3000, seed=5)]
    assert blocks == train


@settings(max_examples=50)
@given(st.text())
def test_a_text_has_one_split(text):
    assert split_of(text) == split_of(text) in SPLITS


def test_shares_of_the_splits():
    assert [split_of(word) for word in ("shore", "wave", "gull")] == ["train"] * 3
    shares = Counter(split_of(str(i), held_out=0.1) for i in range(5000))
    assert shares["train"] == pytest.approx(4000, abs=150)
    assert shares["valid"] == pytest.approx(500, abs=100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dev", 3), "split 'dev': need one of train, valid, test"),
        (("train", 0), "n=0: need at least one"),
        (("train", 3, ["copi"]), "unknown family 'copi'; need some of copy, reverse"),
        (("train", 3, []), "no family given"),
        (("train", 3, None, [4]), "unknown difficulty 4; need some of 1, 2, 3"),
        (("test", 9999, ["arithmetic"], [1]), r"n=9999: .* have about \d\d tasks in 'test'"),
    ],
)
def test_wrong_use_is_named(arguments, message):
    split, n, *rest = arguments
    options = dict(zip(("families", "difficulties"), rest, strict=False))
    with pytest.raises(ValueError, match=message):
        skills(split, n, **options)
