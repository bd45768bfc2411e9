"""Skills: short generated tasks with one exact answer each, easy enough to teach a model of a million parameters."""

import random
from collections.abc import Callable, Iterable, Iterator
from datetime import date, timedelta
from itertools import chain, islice, zip_longest
from typing import Any

from apexlib.files import content_hash
from apexlib.text.cache import text_hash

SPLITS = ("train", "valid", "test")
DIFFICULTIES = (1, 2, 3)

Generator = Callable[[random.Random, int], tuple[dict[str, Any], str]]  # of the fields of a task and its answer

# few, so that a small model meets each of them often
_WORDS = str.split(
    "apple bag bear bird book box bread cake cat chair cloud cow cup dog door egg fish fox girl hat horse key king "
    "lamp leaf map milk moon owl pen pig ring road sand ship star sun tree wind wolf"
)
_ORDINALS = ("first", "second", "third", "fourth")
# written out, since the calendar module's names follow the locale
_DAYS = str.split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_MONTHS = str.split("January February March April May June July August September October November December")


def skills(
    split: str,
    n: int,
    *,
    seed: int = 0,
    families: Iterable[str] | None = None,
    difficulties: Iterable[int] = DIFFICULTIES,
) -> list[dict[str, Any]]:
    """Generate `n` different tasks of `split`, taking turns over families and difficulties (1 easy, 3 hard).

    What a task asks decides its split, by hash (80 % train, 10 % valid, 10 % test): a task of one split is in no other,
    under no seed and in no phrasing. `families` are all of `FAMILIES` if None. Families and difficulties draw
    independently, so leaving one out keeps the rest. When a family has no further task the others go on; when all are
    used up that is an error, which says how many there are.

    >>> task = skills("train", 1, families=["reverse"])[0]
    >>> task["messages"][0]["content"], task["answer"]
    ('Reverse: wind girl.', 'girl wind')
    """
    check_split(split)
    if n < 1:
        raise ValueError(f"n={n}: need at least one task")
    cells = [
        _distinct(family, difficulty, split, seed)
        for difficulty in _known(difficulties, DIFFICULTIES, "difficulty")
        for family in _known(families, tuple(FAMILIES), "family")
    ]
    tasks = list(islice(filter(None, chain.from_iterable(zip_longest(*cells))), n))
    if len(tasks) < n:
        raise ValueError(f"n={n}: these families and difficulties have about {len(tasks)} tasks in {split!r}")
    return tasks


def skills_text(n: int, *, seed: int = 0) -> list[str]:
    """Write tasks as `n` plain documents of five each, question and answer on lines of their own, for pre-training.

    Every task is of the train split and stands in one document only, so no valid or test question is among them.
    """
    pairs = [f"{task['messages'][0]['content']}\n{task['answer']}" for task in skills("train", 5 * n, seed=seed)]
    return ["\n\n".join(pairs[start : start + 5]) for start in range(0, len(pairs), 5)]


def check_split(split: str, allowed: tuple[str, ...] = SPLITS) -> None:
    """Raise ValueError for what is not among the splits."""
    if split not in allowed:
        raise ValueError(f"split {split!r}: need one of {', '.join(allowed)}")


def split_of(text: str, *, held_out: float = 0.05) -> str:
    """Assign `text` to a split by its hash: a share `held_out` to valid, as much to test, the rest to train."""
    share = int.from_bytes(text_hash(text)[:8], "big") / 2**64
    return "test" if share < held_out else "valid" if share < 2 * held_out else "train"


def _known(given: Iterable[Any] | None, known: tuple[Any, ...], what: str) -> list[Any]:
    given = list(known if given is None else given)
    if not given or (unknown := [one for one in given if one not in known]):
        found = f"unknown {what} {unknown[0]!r}" if given else f"no {what} given"
        raise ValueError(f"{found}; need some of {', '.join(map(str, known))}")
    return list(dict.fromkeys(given))


def _distinct(family: str, difficulty: int, split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Draw the tasks of one family and difficulty; end when 2000 draws in a row bring nothing new."""
    generate, phrasings = FAMILIES[family]
    rng = random.Random(f"{family}/{difficulty}/{split}/{seed}")  # a string is seeded through SHA-512, not hash()
    seen, misses = set(), 0
    while misses < 2000:
        fields, answer = generate(rng, difficulty)
        key = content_hash(family, fields)  # not of the phrasing: a rephrased test question is a test question
        misses += 1
        if key not in seen and split_of(key, held_out=0.1) == split:
            misses = 0
            seen.add(key)
            prompt = rng.choice(phrasings).format(**fields)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            yield {"messages": messages, "family": family, "difficulty": difficulty, "answer": answer}


def _words(rng: random.Random, difficulty: int, *sizes: tuple[int, int]) -> list[str]:
    """Draw different words, as many as the range of the difficulty says."""
    return rng.sample(_WORDS, rng.randint(*sizes[difficulty - 1]))


def _copy(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    words = " ".join(_words(rng, difficulty, (2, 3), (4, 5), (6, 8)))
    return {"words": words}, words


def _reverse(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    words = _words(rng, difficulty, (2, 2), (3, 3), (4, 5))
    return {"words": " ".join(words)}, " ".join(words[::-1])


def _sort(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    numbers = rng.sample(range(100), (2, 3, 5)[difficulty - 1])
    return {"numbers": " ".join(map(str, numbers))}, " ".join(map(str, sorted(numbers)))


def _count(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    word, *others = rng.sample(_WORDS, 3)
    size = (3, 5, 8)[difficulty - 1]
    times = rng.randint(1, size - 1)
    words = [word] * times + rng.choices(others, k=size - times)
    rng.shuffle(words)
    return {"word": word, "words": " ".join(words)}, str(times)


def _arithmetic(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    low, high = (0, 20) if difficulty == 1 else (21, 99)
    a, b, c = (rng.randint(low, high) for _ in range(3))
    if difficulty == 3:
        return {"sum": f"{a} + {b} - {c}"}, str(a + b - c)
    if rng.random() < 0.5:
        return {"sum": f"{a} + {b}"}, str(a + b)
    return {"sum": f"{max(a, b)} - {min(a, b)}"}, str(abs(a - b))


def _compare(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    numbers = rng.sample(range((100, 1000, 1000)[difficulty - 1]), (2, 3, 5)[difficulty - 1])
    end, pick = rng.choice((("largest", max), ("smallest", min)))
    return {"end": end, "numbers": " ".join(map(str, numbers))}, str(pick(numbers))


def _lookup(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    words = _words(rng, difficulty, (2, 2), (4, 4), (6, 6))
    values = rng.sample(range(100), len(words))
    asked = rng.randrange(len(words))
    return {"pairs": _pairs(words, values), "word": words[asked]}, str(values[asked])


def _calendar(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    side, sign = rng.choice((("after", 1), ("before", -1)))
    if difficulty == 2:
        names, unit, most = rng.choice(((_DAYS, "day", 30), (_MONTHS, "month", 24)))
        start, n = rng.randrange(len(names)), rng.randint(1, most)
        steps = f"{n} {unit if n == 1 else f'{unit}s'} {side} {names[start]}"
        return {"steps": steps}, names[(start + sign * n) % len(names)]
    while True:  # within a month, or across its end; never across the end of February, which moves
        start = date(2023, 1, 1) + timedelta(days=rng.randrange(365))
        n = rng.randint(1, 3) if difficulty == 1 else rng.randint(4, 20)
        end = start + timedelta(days=sign * n)
        crosses = {start.month, end.month}
        if len(crosses) == (1 if difficulty == 1 else 2) and crosses != {2, 3}:
            given, answer = (f"{_MONTHS[day.month - 1]} {day.day}" for day in (start, end))
            return {"steps": f"{n} {'day' if n == 1 else 'days'} {side} {given}"}, answer


def _membership(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    absent, *words = _words(rng, difficulty, (3, 4), (5, 6), (8, 9))
    word, answer = rng.choice(((absent, "no"), (rng.choice(words), "yes")))
    return {"word": word, "words": " ".join(words)}, answer


def _case(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    words = _words(rng, difficulty, (1, 2), (3, 3), (5, 5))
    styles = {"capitals": str.upper, "lower case": str.lower, "title case": str.title}
    style = rng.choice(list(styles)[: 2 if difficulty == 1 else 3])
    given = [rng.choice([change for name, change in styles.items() if name != style])(word) for word in words]
    return {"style": style, "words": " ".join(given)}, " ".join(map(styles[style], words))


def _format(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    if difficulty == 1:
        name, sign = rng.choice((("dashes", "-"), ("commas", ","), ("slashes", "/")))
        words = rng.sample(_WORDS, rng.randint(2, 3))
        return {"how": f"with {name}", "text": " ".join(words)}, sign.join(words)
    if difficulty == 2:
        day = date(1950, 1, 1) + timedelta(days=rng.randrange(36500))
        return {"how": "as day/month/year", "text": day.isoformat()}, f"{day.day:02}/{day.month:02}/{day.year}"
    words, values = rng.sample(_WORDS, 3), rng.sample(range(100), 3)
    return {"how": "as value=word", "text": _pairs(words, values)}, _pairs(values, words)


def _sequence(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    if difficulty == 3:  # each number is the sum of the two before it
        a, b = rng.randint(1, 30), rng.randint(1, 30)
        numbers = [a, b, a + b, a + 2 * b, 2 * a + 3 * b]
    else:
        step = rng.randint(1, 4) if difficulty == 1 else rng.choice((1, -1)) * rng.randint(5, 12)
        start = rng.randrange(200) if step > 0 else rng.randrange(40, 200)
        numbers = [start + i * step for i in range(4)]
    return {"numbers": ", ".join(map(str, numbers[:-1]))}, str(numbers[-1])


def _position(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    words = _words(rng, difficulty, (2, 3), (4, 5), (6, 7))
    index = rng.choice((0, -1)) if difficulty == 1 else rng.randrange(4)
    if difficulty == 3:
        index = rng.choice((index, -1 - index))
    places = (*_ORDINALS, *(f"{ordinal} to last" for ordinal in reversed(_ORDINALS[1:])), "last")
    return {"place": places[index], "words": " ".join(words)}, words[index]


def _remove(rng: random.Random, difficulty: int) -> tuple[dict[str, Any], str]:
    words = _words(rng, difficulty, (2, 3), (4, 5), (7, 8))
    word = rng.choice(words)
    return {"word": word, "words": " ".join(words)}, " ".join(other for other in words if other != word)


def _pairs(keys: list[Any], values: list[Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))


# Each family's generator, which for one difficulty gives nothing that it gives for another, and its phrasings: each
# opens with words of its own and ends with a stop, so that no prompt is part of another. A task's split is hashed from
# the names and values of its fields: a field that is renamed moves tasks between splits.
FAMILIES: dict[str, tuple[Generator, tuple[str, ...]]] = {
    "copy": (_copy, ("Copy: {words}.", "Repeat these words: {words}.", "Say exactly this: {words}.")),
    "reverse": (_reverse, ("Reverse: {words}.", "Say these words backwards: {words}.")),
    "sort": (_sort, ("Sort: {numbers}.", "Put in order, smallest first: {numbers}.")),
    "count": (_count, ("How many times is {word} in: {words}?", "Count {word} in this list: {words}.")),
    "arithmetic": (_arithmetic, ("What is {sum}?", "Compute {sum}.", "Work out: {sum}.")),
    "compare": (_compare, ("Which is the {end}: {numbers}?", "Find the {end} number of {numbers}.")),
    "lookup": (_lookup, ("Given {pairs}, what is {word}?", "Look up {word} in {pairs}.")),
    "calendar": (_calendar, ("What comes {steps}?", "Name what is {steps}.")),
    "membership": (_membership, ("Is {word} in: {words}?", "Does this list have {word}: {words}?")),
    "case": (_case, ("Write in {style}: {words}.", "Change to {style}: {words}.")),
    "format": (_format, ("Rewrite {how}: {text}.", "Give this {how}: {text}.")),
    "sequence": (_sequence, ("What comes next: {numbers}?", "Continue {numbers}, with one number.")),
    "position": (_position, ("What is the {place} word of: {words}?", "Take the {place} word from: {words}.")),
    "remove": (_remove, ("Remove {word} from: {words}.", "Leave out {word}: {words}.")),
}
