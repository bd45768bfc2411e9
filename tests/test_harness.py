"""EleutherAI's lm-evaluation-harness measures what `exact_match` and `multiple_choice` measure, without a network."""

import pytest
from conftest import build
from test_evaluation import answering  # noqa: F401

from apexlib import exact_match, harness_tasks, multiple_choice
from apexlib.text.harness import by_token, with_choices
from apexlib.text.skills import skills, skills_text
from apexlib.text.tokenizer import train_tokenizer


def measured(folder, names, model, tokenizer):
    """What the harness finds, per example, in their order."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    found = simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)
    rows = {name: sorted(found["samples"][name], key=lambda row: row["doc_id"]) for name in names}
    means = [
        next(value for key, value in found["results"][name].items() if key.split(",")[0] in ("exact_match", "acc"))
        for name in names
    ]
    return means, rows


def compare(folder, model, tokenizer, examples):
    names = harness_tasks(examples, folder, tokenizer, max_new_tokens=6)
    assert names == ["skills", "skills_choice"]
    means, rows = measured(folder, names, model, tokenizer)
    written = exact_match(model, tokenizer, examples, max_new_tokens=6)
    chosen = multiple_choice(model, tokenizer, examples)
    assert [row["resps"][0][0].strip() for row in rows["skills"]] == written["output"].str.strip().tolist()
    assert [bool(row["exact_match"]) for row in rows["skills"]] == written["correct"].tolist()
    assert [bool(row["acc"]) for row in rows["skills_choice"]] == chosen["correct"].tolist()
    assert means == pytest.approx([written["correct"].mean(), chosen["correct"].mean()])
    return means


def test_the_harness_counts_what_we_count_on_skills(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    tokenizer = train_tokenizer(skills_text(40), 300)
    model = build("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    examples = with_choices(skills("test", 28, difficulties=[1]))
    assert 0 < compare(tmp_path / "tasks", model, tokenizer, examples)[1] < 1


def test_the_harness_counts_what_we_count_on_a_model_that_knows_some_answers(answering, tmp_path):  # noqa: F811
    model, tokenizer, examples = answering
    wrong = [{**example, "answer": answer} for example, answer in zip(examples[:2], ("bee", "ant bee"), strict=True)]
    examples = with_choices([{**example, "family": "words"} for example in [*examples, *wrong]])
    assert compare(tmp_path / "tasks", model, tokenizer, examples)[0] == 6 / 8


def test_the_likeliest_per_token_is_chosen():
    example = {"choices": ["a", "a b"], "tokens": [1, 3], "answer": "a b"}
    assert by_token(example, [(-2.0, False), (-3.0, False)]) == {"acc": 1.0}
    assert by_token(example, [(-2.0, False), (-6.3, False)]) == {"acc": 0.0}


def test_choices_are_answers_of_the_family_and_the_same_every_time():
    examples = skills("test", 60)
    found = with_choices(examples, choices=3, seed=1)
    assert found == with_choices(examples, choices=3, seed=1) != with_choices(examples, choices=3, seed=2)
    for example in found:
        assert example["answer"] in example["choices"]
        assert len(set(example["choices"])) == len(example["choices"]) <= 3
        assert set(example["choices"]) <= {each["answer"] for each in examples if each["family"] == example["family"]}


def test_what_cannot_be_asked_is_refused(tmp_path):
    tokenizer = train_tokenizer(["a b c"] * 2, 270)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for examples, message in (
        ([], "no examples: need at least one"),
        ([{"messages": messages}], "example 0: answer None is NoneType; need text"),
        ([{"messages": messages, "answer": "b", "choices": ["a"]}], "answer 'b' is not among its choices"),
    ):
        with pytest.raises(ValueError, match=message):
            harness_tasks(examples, tmp_path / "tasks", tokenizer)
    (tmp_path / "x").write_text("x")
    with pytest.raises(FileExistsError, match="need a new one"):
        harness_tasks([{"messages": messages, "answer": "b"}], tmp_path, tokenizer)
