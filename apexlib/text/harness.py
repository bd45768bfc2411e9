"""Tasks for EleutherAI's lm-evaluation-harness, so that others measure as `exact_match` and `multiple_choice` do.

    lm_eval --model hf --model_args pretrained=FOLDER --include_path TASKS --tasks skills,skills_choice

The harness is not needed to write them. Prompts are written out in the chat template, so no option asks for it.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from apexlib.files import atomic_folder, check_new

# JSON is YAML, but for the tag of a function
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
target_delimiter: ""
"""
_WRITTEN = """\
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {tokens}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: ['^\\s+', '\\s+$']}}]
"""
_CHOSEN = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(answer)}}"
process_results: !function apexlib.text.harness.by_token
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def harness_tasks(
    examples: Sequence[Mapping[str, Any]],
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "skills",
    max_new_tokens: int = 48,
) -> list[str]:
    """Write examples as tasks of lm-evaluation-harness to a new folder; return the names of the tasks.

    `name`: all examples, to be answered and compared with `answer`. `name`_choice, where examples have `choices`: the
    likeliest per token of `tokenizer` is the answer. Both give what `exact_match` and `multiple_choice` give, but for
    chat templates that end with white space, which the harness counts to the answer. The data's path is in the tasks,
    so the folder stays where it is.
    """
    folder = Path(folder)
    check_new(folder)
    rows = []
    for row, example in enumerate(examples):
        if not isinstance(answer := example.get("answer"), str):
            raise ValueError(f"example {row}: answer {answer!r} is {type(answer).__name__}; need text")
        messages = list(example["messages"][:-1])
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows.append({"prompt": prompt, "answer": answer})
        if choices := list(example.get("choices", ())):
            if answer not in choices:
                raise ValueError(f"example {row}: answer {answer!r} is not among its choices {choices}")
            lengths = [len(tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in choices]
            rows[-1] |= {"choices": choices, "tokens": lengths}
    if not rows:
        raise ValueError("no examples: need at least one")
    tasks = {name: (_WRITTEN.format(tokens=max_new_tokens), rows)}
    if chosen := [row for row in rows if "choices" in row]:
        tasks[f"{name}_choice"] = (_CHOSEN, chosen)
    with atomic_folder(folder) as temporary:
        for task, (text, own) in tasks.items():
            lines = "".join(json.dumps(row) + "\n" for row in own)
            (temporary / f"{task}.jsonl").write_text(lines, encoding="utf-8")
            data = json.dumps(str((folder / f"{task}.jsonl").resolve()))
            (temporary / f"{task}.yaml").write_text(_TASK.format(name=task, data=data) + text, encoding="utf-8")
    return list(tasks)


def with_choices(examples: Sequence[Mapping[str, Any]], *, choices: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Give each example with an `answer` up to so many `choices`: its own and other answers of its family, shuffled.

    >>> from apexlib.text.skills import skills
    >>> tasks = with_choices(skills("test", 20, families=["membership"], difficulties=[1]))
    >>> sorted(tasks[0]["choices"])
    ['no', 'yes']
    """
    found, rng = [], random.Random(f"choices/{seed}")
    answers: dict[Any, list[str]] = {}
    for example in examples:
        answers.setdefault(example.get("family"), []).append(example["answer"])
    for example in examples:
        others = sorted({*answers[example.get("family")]} - {example["answer"]})
        chosen = [example["answer"], *rng.sample(others, min(choices - 1, len(others)))]
        rng.shuffle(chosen)
        found.append({**example, "choices": chosen})
    return found


def by_token(example: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Whether the choice that is likeliest per token is the answer; the harness calls it for each example."""
    means = [likelihood / tokens for (likelihood, _), tokens in zip(results, example["tokens"], strict=True)]
    return {"acc": float(example["choices"][means.index(max(means))] == example["answer"])}
