"""Questions of test files: what is asked of a model, and how its answer is scored."""

from collections.abc import Mapping
from typing import Any

ARITHMETIC = ("addsub", "multiarith", "singleeq", "svamp", "mawps")  # each too small to be read alone
LOSS_ONLY = ("gsm8k",)  # solutions that a small model takes 150 tokens to write and does not get right


def scored(example: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a conversation of a test file to what decides its score: `messages`, `family`, `answer` and `choices`.

    Lettered choices become the texts a model is trained to answer with ("B. gravity"), which are compared by their
    likelihood, as "true" and "false" are. What has no choices is to be written, and right where the part after the
    last `####` is; the small arithmetic sets count as one family. Of what has no `answer`, and of `LOSS_ONLY`, only the
    loss is measured.

    >>> question = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "#### 2"}]
    >>> scored({"task": "svamp", "messages": question, "answer": "2"})["family"]
    'arithmetic'
    """
    task = str(example.get("task", "other"))
    row = {"messages": example["messages"], "family": "arithmetic" if task in ARITHMETIC else task}
    answer, choices = None if task in LOSS_ONLY else example.get("answer"), list(example.get("choices", ()))
    if answer is not None and choices and answer not in choices:
        lettered = {(letter := chr(ord("A") + index)): f"{letter}. {choice}" for index, choice in enumerate(choices)}
        if answer not in lettered:
            raise ValueError(f"{task}: answer {answer!r} is neither one of the choices {choices} nor its letter")
        answer, choices = lettered[answer], list(lettered.values())
    return row | ({} if answer is None else {"answer": answer}) | ({"choices": choices} if choices else {})
