"""The ledger: its rule and its measures, each against a literal computation, and what it refuses."""

import copy
import re
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from apexlib.analysis.intervals import interval, spearman, summarise
from apexlib.suite.ledger import choose, claims_table, decide, example_noise, measured, read_claims, repeated
from apexlib.suite.measures import MEASURES

values_of_seeds = st.lists(st.floats(-1e3, 1e3).map(lambda value: round(value, 3)), min_size=3, max_size=6)
OPPOSITE = {"reproduced": "opposite", "opposite": "reproduced"}
ENTRY = {
    "number": 1,
    "id": "better",
    "source": "s",
    "statement": "It is better.",
    "expected": "+1",
    "measure": {"lead": {"table": "instruction", "of": "apex", "over": "full", "column": "exact_match"}},
    "rule": "exact match, less that of the other",
    "margin": 0.01,
    "because": "less is not noticed",
    "unit": "share",
    "notebooks": ["00_first", "03_runs"],
    "limits": "None.",
}


def ledger(tmp_path, *entries):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump([copy.deepcopy(entry) for entry in entries]), encoding="utf-8")
    return read_claims(path)


def write(folder, **tables):
    """Write tables given as rows of values below a line of column names."""
    for name, (columns, *rows) in tables.items():
        (folder / name).parent.mkdir(exist_ok=True)
        pd.DataFrame(rows, columns=columns.split()).to_csv(folder / f"{name}.csv", index=False)


# the rule


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(2.0, 3.0, size=(4000, 3))
    covered = np.mean([low < 2.0 < high for low, high in map(interval, draws)])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_one_value_has_no_interval_and_none_or_nan_is_refused():
    assert interval([1.0]) == (-np.inf, np.inf)
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="need at least one, all finite"):
            interval(values)


NEVER = -np.inf


@pytest.mark.parametrize(
    ("values", "rule", "verdict"),
    [
        ([1.0, 1.1, 0.9], {}, "reproduced"),
        ([-1.0, -1.1, -0.9], {}, "opposite"),
        ([1.0, -1.0, 0.5], {}, "undecided"),
        ([0.0, 0.0, 0.0], {}, "undecided"),  # on the border: neither more nor less than nothing
        ([0.0, 0.0, 0.0], {"margin": 0.1}, "no difference"),
        ([1.0, 1.1, 0.9], {"margin": 2}, "no difference"),
        ([1.0, 1.1, 0.9], {"margin": 1}, "undecided"),  # it may be more than the margin, and less
        ([1.0, 1.1, 0.9], {"goal": 1.0, "margin": 0.5}, "no difference"),
        ([1.0, 1.1, 0.9], {"goal": 2.0, "margin": 0.5}, "opposite"),
        ([-1.0, -1.1, -0.9], {"needs": "at least", "margin": 2}, "reproduced"),
        ([-1.0, -1.1, -0.9], {"needs": "at least", "margin": 0.5}, "opposite"),
        ([-1.0, -1.1, -0.9], {"needs": "at least", "margin": 1}, "undecided"),
        ([1.0, 1.1], {}, "undecided"),
        ([1.0], {}, "undecided"),
        ([], {}, "not measured"),
        ([NEVER] * 3, {}, "opposite"),
        ([NEVER] * 2, {}, "undecided"),
        ([NEVER, 1.0, 1.1], {}, "undecided"),
        ([*[NEVER] * 9, 1.0], {}, "opposite"),  # the median, by a sign test: p = 0.02
        ([*[NEVER] * 8, 1.0, 1.0], {}, "undecided"),
        ([*[NEVER] * 8, -1.0, 1.0], {"margin": 0.5}, "opposite"),
        ([*[NEVER] * 8, -1.0, 1.0], {"margin": 2}, "undecided"),
        ([*[NEVER] * 9, 1.0], {"goal": 3.0, "margin": 1}, "opposite"),
    ],
)
def test_the_verdict_follows_interval_and_margin(values, rule, verdict):
    row = decide(values, **rule)
    assert row["verdict"] == verdict
    assert row["n"] == len(values)
    assert row["mean"] == pytest.approx(np.mean(values) if values else np.nan, nan_ok=True)


@given(values_of_seeds, st.floats(0, 100), st.sampled_from(["more", "at least"]))
def test_the_verdict_is_that_of_the_interval(values, margin, needs):
    row = decide(values, margin=margin, needs=needs)
    low, high = row["low"], row["high"]
    if min(abs(low - margin), abs(high - margin), abs(low + margin), abs(high + margin)) < 1e-6:
        return  # on a border rounding decides
    where = {"reproduced": low > (margin if needs == "more" else -margin), "opposite": high < -margin}
    where["no difference"] = needs == "more" and -margin < low and high < margin
    assert [name for name, holds in where.items() if holds] == [row["verdict"]] * (row["verdict"] != "undecided")
    assert (row["p"] < 0.05) == (row["verdict"] != "undecided")


@given(values_of_seeds, st.floats(0, 100))
def test_the_verdict_turns_with_the_sign_and_does_not_see_order_or_unit(values, margin):
    verdict = decide(values, margin=margin)["verdict"]
    assert decide([-value for value in values], margin=margin)["verdict"] == OPPOSITE.get(verdict, verdict)
    assert decide([1024 * value for value in values], margin=1024 * margin)["verdict"] == verdict
    row, turned = decide(values), decide(values[::-1])
    assert turned["low"] == pytest.approx(row["low"], abs=1e-9)
    assert turned["high"] == pytest.approx(row["high"], abs=1e-9)


def test_the_error_of_a_verdict_is_what_it_says():
    draws = np.random.default_rng(0).normal(size=(3000, 5))
    for mean, wrong in {
        0.0: {"reproduced", "opposite"},
        0.5: {"reproduced", "opposite"},
        1.0: {"no difference"},
    }.items():
        found = [decide(values, margin=0.5)["verdict"] for values in mean + draws]
        assert np.mean([verdict in wrong for verdict in found]) < 0.05


def test_together_holds_what_is_left_of_the_verdicts_by_holm(tmp_path):
    draws = np.random.default_rng(0).normal(0.1, 0.02, size=(4, 5))
    draws[0] += 0.3
    draws[3] = 0.1, -0.1, 0.1, -0.1, 0.1
    rows = [("full", seed, 0.0, 0.0, 0.0, 0.0) for seed in range(5)] + [("apex", s, *draws[:, s]) for s in range(5)]
    write(tmp_path, instruction=("method seed a b c d", *rows))
    entries = [
        ENTRY | {"number": n, "id": c, "statement": c, "measure": {"lead": LEAD | {"column": c}}}
        for n, c in enumerate("abcd", 1)
    ]
    table = claims_table(tmp_path, claims=ledger(tmp_path, *entries)).set_index("claim")
    order, kept = table["p"].sort_values().index, True
    for rank, name in enumerate(order):  # the smallest against a quarter of 5 %, the next against a third, …
        kept = kept and table["p"][name] < 0.05 / (4 - rank)
        assert table["together"][name] == (table["verdict"][name] if kept else "undecided")
    assert table["together"]["d"] == "undecided"


def test_summaries_are_per_group():
    table = pd.DataFrame({"m": ["a", "a", "a", "b"], "x": [1.0, 2.0, 3.0, 7.0]})
    rows = summarise(table, ["m"], "x").set_index("m")
    assert rows.loc["a", ["low", "high"]].tolist() == list(interval([1.0, 2.0, 3.0]))
    assert rows.loc["b", ["mean", "low", "high", "n"]].tolist() == [7.0, 7.0, 7.0, 1]


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), max_size=8))
def test_rank_correlation_sees_the_order_alone(pairs):
    x, y = (pd.Series([pair[side] for pair in pairs], dtype=float) for side in (0, 1))
    found = spearman(x, y)
    if len(pairs) < 3 or x.nunique() < 2 or y.nunique() < 2:
        assert np.isnan(found)
    else:
        ranks = [[(each < one).sum() + (each == one).sum() / 2 for one in each] for each in (x, y)]
        assert found == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-9)
        assert spearman(np.exp(x), y**3) == pytest.approx(found, abs=1e-9)
        assert spearman(x, -y) == pytest.approx(-found, abs=1e-9)


# measures: name → arguments, tables, value of each seed by hand

INSTRUCTION = (
    "method chosen seed exact_match answer_loss seconds_per_step trainable",
    ("full", True, 0, 0.5, 1.0, 2.0, 1.0),
    ("full", True, 1, 0.25, 2.0, 4.0, 1.0),
    ("full", False, 1, 0.99, 0.1, 9.0, 1.0),  # another learning rate
    ("apex", True, 1, 0.5, 1.5, 5.0, 0.5),
    ("apex", True, 0, 0.5, 0.25, 1.0, 0.6),
    ("apex", True, 2, 0.9, 0.5, 1.0, 0.6),  # no partner
    ("null", True, 0, 1.0, 1.0, 1.0, 1.0),
)
MASKING = (
    "component order fraction draw seed increase",
    ("channel", "advantageous", 0.1, 0, 0, 4.0),
    ("channel", "random", 0.1, 0, 0, 1.0),
    ("channel", "random", 0.1, 1, 0, 2.0),
    ("channel", "disadvantageous", 0.1, 0, 0, 0.5),
    ("channel", "disadvantageous", 0.2, 0, 0, 9.0),
    ("head", "disadvantageous", 0.1, 0, 0, 9.0),
)
IMBALANCE = (
    "component model tokens seed layer cv",
    *(("head", model, tokens, 0, layer, 1 + tokens + layer) for model in "ab" for tokens in (0, 8) for layer in (0, 1)),
    ("head", "b", 1, 0, 0, 5.0),
    ("head", "b", 1, 0, 1, 6.0),
    ("channel", "b", 8, 0, 0, 99.0),
)
SIZES = ("model parameters", ("b", 20), ("a", 10))
CONTINUED = (
    "method chosen seed tokens loss retention_loss",
    ("apex", True, 0, 100, 3.0, np.nan),
    ("apex", True, 0, 200, 2.0, 4.0),
    ("full", True, 0, 200, 2.25, 3.5),
    ("full", True, 0, 100, 3.0, np.nan),
)
STAGES = ("variant seed answer_loss", ("stages-1", 0, 3.0), ("stages-3", 0, 2.0), ("stages-4", 0, 1.75), ("apex", 0, 1))
RATIO = ("method seed ratio", ("apex", 0, 0.5), ("apex", 1, np.inf), ("direct", 0, 0.1))
RANK = (
    "method seed erank_change answer_loss_gain",
    ("full", 0, 0.1, 1.0),
    ("apex", 0, 0.3, 2.0),
    ("hft", 0, 0.2, 3.0),
    ("base", 0, 0.0, 0.0),
    ("apex", 1, 0.3, 2.0),  # too few of this seed for a correlation
)
FRONT = (
    "method learning_rate seed answer_loss retention_loss update_norm erank_change",
    ("base", 0, 0, 4.0, 3.0, 0.0, 0.0),
    ("full", 0.1, 0, 2.0, 4.0, 0.2, 0.1),
    ("full", 0.2, 0, 2.5, 9.0, 0.4, 0.1),  # further in weights, not in the task
    ("full", 0.3, 0, 7.0, 12.0, 0.3, 0.1),  # further from the base than any, but the wrong way
    ("apex", 0.1, 0, 3.0, 3.2, 0.1, 0.2),
    ("apex", 0.2, 0, 1.0, 3.4, 0.6, 0.7),
    ("apex", 0.2, 1, 1.0, 3.4, 0.6, 0.7),  # a seed without a base
)
STEPS = (
    "case kind method ratio checkpointing compiled",
    ("a model", "model", "full", 1.0, False, False),
    ("a model", "model", "apex", 0.75, False, False),
    ("compiled", "model", "full", 1.0, False, True),
    ("compiled", "model", "apex", 0.5, False, True),
    ("a block", "block", "apex", 0.5, False, False),
    ("another", "model", "apex", 0.5, False, False),
)
LEAD = {"table": "instruction", "of": "apex", "over": "full"}
MASK = {"component": "channel", "fraction": 0.1}
CASES = [
    ("lead", LEAD | {"column": "exact_match"}, {"instruction": INSTRUCTION}, {0: 0.0, 1: 0.25}),
    ("lead", LEAD | {"column": "answer_loss"}, {"instruction": INSTRUCTION}, {0: 0.75, 1: 0.5}),
    (
        "matched",  # full comes from 4 to 2 and forgets 1; there APEX, half way from 3 to 1, has forgotten 0.2 + 0.1
        LEAD | {"table": "front", "column": "retention_loss", "along": "answer_loss"},
        {"front": FRONT},
        {0: 1 - 0.3},
    ),
    (
        "matched",
        LEAD | {"table": "front", "column": "erank_change", "along": "update_norm"},
        {"front": FRONT},
        {0: 0.5 - 0.1},
    ),
    ("lead", LEAD | {"table": "continued", "column": "loss"}, {"continued": CONTINUED}, {0: 0.25}),
    ("lead", LEAD | {"table": "continued", "column": "retention_loss"}, {"continued": CONTINUED}, {0: -0.5}),
    ("rise", {"table": "rank_gain", "of": "apex", "column": "erank_change"}, {"rank_gain": RANK}, {0: 0.3, 1: 0.3}),
    ("step_time", {"of": "apex", "over": "full"}, {"../bench/steps": STEPS}, {"a model": 0.25}),
    (
        "share_off",
        {"method": "apex", "expected": 0.55},
        {"instruction": INSTRUCTION},
        {0: -0.05, 1: -0.05, 2: -0.05},
    ),
    ("stages_flatten", {"of": ["stages-1", "stages-3", "stages-4"]}, {"ablations": STAGES}, {0: 0.25}),
    ("tokens_saved", {"method": "apex"}, {"continued_ratio": RATIO}, {0: 0.5, 1: NEVER}),
    ("rank_correlation", {}, {"rank_gain": RANK}, {0: 0.5}),
    (
        "masking_gap",
        MASK | {"more": "advantageous", "less": "disadvantageous"},
        {"masking": MASKING},
        {0: 4 - 0.5},
    ),
    ("masking_gap", MASK | {"more": "random", "less": "disadvantageous"}, {"masking": MASKING}, {0: 1.5 - 0.5}),
    (
        "evens_with_training",
        {"component": "head"},
        {"imbalance": IMBALANCE, "models": SIZES},
        {0: -1.0},
    ),
    ("evens_with_size", {"component": "head"}, {"imbalance": IMBALANCE, "models": SIZES}, {0: 0.0}),
]


@pytest.mark.parametrize(("name", "arguments", "tables", "expected"), CASES)
def test_a_measure_is_what_a_hand_computes(name, arguments, tables, expected, tmp_path):
    with pytest.raises(FileNotFoundError):
        MEASURES[name](tmp_path / "run", **arguments)
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", **tables)
    assert MEASURES[name](tmp_path / "run", **arguments).dropna().to_dict() == pytest.approx(expected)


def test_every_measure_is_tested():
    assert {name for name, *_ in CASES} == set(MEASURES)


def test_nothing_is_measured_where_a_model_has_no_history_or_no_smaller_one(tmp_path):
    alone = ("component model tokens seed layer cv", ("head", "given", 0, 0, 0, 1.0))
    write(tmp_path, imbalance=alone, models=SIZES)
    for name in ("evens_with_training", "evens_with_size"):
        assert MEASURES[name](tmp_path, component="head").empty
    write(tmp_path, imbalance=alone, models=("model parameters", ("given", 5)))
    assert MEASURES["evens_with_training"](tmp_path, component="head").empty


def test_runs_are_compared_at_equal_tokens_unless_one_is_to_have_fewer(tmp_path):
    write(tmp_path, continued=(*CONTINUED, ("apex", True, 0, 300, 1.0, 4.0)))
    ends = r"continued\.csv: runs of apex and full end after \[300\] and \[200\] tokens"
    for asked, need in ((False, "equal numbers"), (True, "fewer of the first")):
        with pytest.raises(ValueError, match=rf"{ends}: need {need}"):
            MEASURES["lead"](tmp_path, **LEAD | {"table": "continued", "column": "loss", "on_fewer_tokens": asked})
    fewer = LEAD | {"table": "continued", "column": "loss", "of": "full", "over": "apex", "on_fewer_tokens": True}
    assert MEASURES["lead"](tmp_path, **fewer).to_dict() == {0: 1.0 - 2.25}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("full", True, 0, 0.1, 1.0, 1.0, 1.0), r"method full: seed 0 is there twice"),
        (("full", True, 7, np.nan, 1.0, 1.0, 1.0), r"method full: need a finite exact_match for every seed"),
        (("full", True, 7, np.inf, 1.0, 1.0, 1.0), r"method full: need a finite exact_match for every seed"),
    ],
)
def test_a_faulty_table_is_named_not_skipped(row, said, tmp_path):
    write(tmp_path, instruction=(*INSTRUCTION, row))
    with pytest.raises(ValueError, match=said):
        claims_table(tmp_path, claims=ledger(tmp_path, ENTRY))


def test_a_missing_column_is_named(tmp_path):
    write(tmp_path, instruction=("method seed", ("full", 0)))
    with pytest.raises(ValueError, match=r"instruction\.csv: no column exact_match; it has method, seed"):
        claims_table(tmp_path, claims=ledger(tmp_path, ENTRY))


def test_names_that_look_like_missing_values_are_names(tmp_path):
    write(tmp_path, instruction=INSTRUCTION)
    values = MEASURES["rise"](tmp_path, table="instruction", of="null", column="exact_match")
    assert values.to_dict() == {0: 1.0}


# the table


def test_a_row_says_what_was_claimed_and_what_was_measured(tmp_path):
    rows = [("full", seed, 0.5) for seed in range(3)] + [("apex", seed, 0.75 + seed / 100) for seed in range(3)]
    write(
        tmp_path,
        instruction=("method seed exact_match", *rows),
        instruction_families=("method seed family examples", *((m, s, f, 50) for m, s, _ in rows for f in "ab")),
    )
    (row,) = claims_table(tmp_path, claims=ledger(tmp_path, ENTRY)).to_dict("records")
    low, high = interval([0.25, 0.26, 0.27])
    one, other = 51 / 102, 77 / 102
    noise = 1.96 * np.sqrt((one * (1 - one) + other * (1 - other)) / 102)
    assert row == {
        **{name: ENTRY[name] for name in ("number", "source", "statement", "expected", "rule", "unit")},
        **{name: ENTRY[name] for name in ("margin", "because")},
        "needs": "more",
        "goal": 0.0,
        "p": decide([0.25, 0.26, 0.27], margin=0.01)["p"],
        "together": "reproduced",
        "claim": "better",
        "mean": pytest.approx(0.26),
        "low": pytest.approx(low),
        "high": pytest.approx(high),
        "n": 3,
        "verdict": "reproduced",
        "limits": f"None. 100 test examples: their draw alone may move the difference by ±{noise:.3f}.",
        "notebook": "03_runs",
        "scale": tmp_path.name,
    }


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.7), (0.01, 0.02)])
def test_the_noise_of_examples_covers_the_difference_of_independent_answers(low, high, tmp_path):
    rng, n = np.random.default_rng(0), 200
    shares = rng.binomial(n, [low, high], size=(20000, 2)) / n
    runs, families = [("full", 0, low), ("apex", 0, high)], [("full", 0, "a", n), ("apex", 0, "a", n)]
    write(
        tmp_path,
        instruction=("method seed exact_match", *runs),
        instruction_families=("method seed family examples", *families),
    )
    (claim,) = ledger(tmp_path, ENTRY)
    noise = float(re.search(r"±([\d.]+)\.", example_noise(tmp_path, claim))[1])
    within = np.mean(np.abs(shares[:, 1] - shares[:, 0] - (high - low)) < noise)
    assert 0.94 < within < 0.99


def test_a_test_that_both_fail_or_both_solve_does_not_show_them_as_equal(tmp_path):
    rows = [(method, seed, share) for method in ("full", "apex") for seed, share in enumerate((0, 1, 0.5))]
    write(tmp_path, instruction=("method seed exact_match", *rows))
    assert MEASURES["lead"](tmp_path, **LEAD | {"column": "exact_match"}).to_dict() == {2: 0}


def test_a_comparison_that_is_no_fine_tuning_has_no_verdict(tmp_path):
    rows = [("full", seed, 0.5) for seed in range(3)] + [("apex", seed, 0.75 + seed / 100) for seed in range(3)]
    write(tmp_path, instruction=("method seed exact_match", *rows))
    claims = ledger(tmp_path, ENTRY | {"gate": "gate"})
    for method, holds, n in (("apex", True, 3), ("apex", False, 0), ("all", False, 0), ("lora", False, 3)):
        write(tmp_path, gate=("method condition value holds", (method, "rate", 0.5, holds), ("full", "rest", 1, True)))
        (row,) = claims_table(tmp_path, claims=claims).to_dict("records")
        assert row["n"] == n
        assert row["verdict"] == ("reproduced" if n else "not measured")
        assert row["limits"] == ("None." if n else f"None. No verdict: rate{' of apex' * (method != 'all')} is 0.5.")


def test_a_verdict_stands_beside_that_of_another_run(tmp_path):
    claims = claims_table(tmp_path, claims=ledger(tmp_path, ENTRY, ENTRY | {"number": 2, "id": "b", "statement": "B."}))
    assert repeated(claims, tmp_path / "none")["elsewhere"].tolist() == ["", ""]
    write(tmp_path / "other", claims=("claim verdict", ("b", "opposite"), ("c", "reproduced")))
    assert repeated(claims, tmp_path / "other")["elsewhere"].tolist() == ["", "opposite"]


def test_without_tables_nothing_is_measured_and_nothing_fails(tmp_path):
    table = claims_table(tmp_path)
    assert set(table["verdict"]) == {"not measured"}
    assert set(table["n"]) == {0}
    assert table["number"].tolist() == [claim.number for claim in read_claims()]
    write(tmp_path, instruction=INSTRUCTION[:2])  # no run of APEX
    assert set(claims_table(tmp_path, only=[9, 10, 27])["verdict"]) == {"not measured"}


def test_claims_are_chosen_by_number_id_or_deciding_notebook(tmp_path):
    other = ENTRY | {"number": 2, "id": "other", "statement": "Else.", "notebooks": ["03_runs", "05_rank"]}
    both = ledger(tmp_path, other, ENTRY)
    assert [claim.id for claim in both] == ["better", "other"]  # in the order of numbers
    for only, ids in {(2, 1): ["better", "other"], ("other",): ["other"], ("03_runs",): ["better"], (): []}.items():
        assert [claim.id for claim in choose(both, only)] == ids
        assert claims_table(tmp_path, only=only, claims=both)["claim"].tolist() == ids
    with pytest.raises(ValueError, match=r"unknown claim 3: need one of 1 to 2$"):
        choose(both, [3])
    with pytest.raises(ValueError, match="unknown claim 'bettter': did you mean better"):
        choose(both, ["bettter"])


def test_numbers_are_written_with_three_digits_of_the_wider_end():
    row = SimpleNamespace(mean=-0.00012345, low=-0.0025, high=0.0023, n=3, unit="none")
    assert measured(row) == "-0.00012 [-0.00250, +0.00230]"
    row.n, row.unit = 1, "nats"
    assert measured(row) == "-0.000123 nats, one seed"
    assert measured(SimpleNamespace(mean=0.0, low=0.0, high=0.0, n=3, unit="none")) == "+0.0, the same from every seed"
    never = SimpleNamespace(mean=NEVER, low=np.nan, high=np.nan, n=3, unit="tokens", verdict="opposite")
    assert measured(never) == "did not reach it"
    never.verdict = "undecided"
    assert measured(never) == "did not reach it from every seed"
    never.verdict, never.high = "opposite", 0.0767
    assert measured(never) == "did not reach it from every seed; +0.077 at best"
    assert measured(SimpleNamespace(mean=np.nan, low=np.nan, high=np.nan, n=0, unit="nats per token")) == "–"


# what a ledger may not be


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit": None}, r"claim 1: unit: Input should be a valid string, got None"),
        (
            {"limits": "", "notebooks": []},
            r"claim 1: notebooks: .* 1 item.*, got \[\]; claim 1: limits: .* 1 char",
        ),
        ({"value": "v"}, r"claim 1: value: Extra inputs are not permitted; known: number, id, .*, got 'v'"),
        ({"number": "one"}, r"claim 1: number: Input should be a valid integer, got 'one'"),
        ({"number": True}, r"claim 1: number: Input should be a valid integer, got True"),
        ({"expected": 3}, r"claim 1: expected: Input should be a valid string, got 3"),
        ({"notebooks": ["00_first", 3]}, r"claim 1: notebooks 1: Input should be a valid string, got 3"),
        ({"notebooks": "00_first"}, r"claim 1: notebooks: Input should be a valid tuple, got '00_first'"),
        ({"measure": {"a": {}, "b": {}}}, r"claim 1: measure: .* at most 1 item .*, got {'a'"),
        ({"measure": {"leed": {}}}, r"claim 1: measure: unknown measure 'leed'; known: masking_gap, .*lead"),
        ({"measure": {"rise": {"of": "apex"}}}, r"claim 1: measure: rise: missing a required argument: 'table'"),
        ({"measure": {"rank_correlation": {"of": "x"}}}, r"claim 1: measure: rank_correlation: got an unexpected"),
        ({"measure": {"rank_correlation": 3}}, r"claim 1: measure rank_correlation: .* valid dictionary, got 3"),
    ],
)
def test_a_faulty_claim_is_named(change, said, tmp_path):
    with pytest.raises(ValueError, match=rf"claims\.yaml: {said}"):
        ledger(tmp_path, ENTRY | change)


@pytest.mark.parametrize("name", ENTRY)
def test_a_claim_without_a_field_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"claims\.yaml: claim 2: {name}: Field required$"):
        ledger(tmp_path, ENTRY, {key: value for key, value in ENTRY.items() if key != name})


def test_a_file_of_faulty_claims_gets_a_short_answer(tmp_path):
    faulty = ENTRY | {"number": "n" * 5_000} | {f"extra-{row}": row for row in range(100)}
    started = time.process_time()
    with pytest.raises(ValueError, match=r"claims\.yaml: claim 1: number") as caught:
        ledger(tmp_path, *[faulty] * 100)
    assert len(str(caught.value)) < 5_000
    assert time.process_time() - started < 30  # seconds; its 10,000 faults are listed once, not once for each


@pytest.mark.parametrize("field", ["number", "id", "statement"])
def test_what_tells_claims_apart_is_there_once(field, tmp_path):
    other = ENTRY | {"number": 2, "id": "other", "statement": "Else."}
    with pytest.raises(ValueError, match=rf"{field} {ENTRY[field]!r} is there 2 times, need it once"):
        ledger(tmp_path, ENTRY, other | {field: ENTRY[field]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"claims\.yaml: Input should be a valid list, got None"),
        ("[]", r"claims\.yaml: List should have at least 1 item"),
        ("- 3", r"claims\.yaml: claim 1: Input should be a valid dictionary.*, got 3"),
        ("- [", r"claims\.yaml: while parsing"),
        ("- &a {}\n- *a", r"claims\.yaml: alias \*a, need the value in .*line 2"),
        pytest.param("#" * 1_000_001, r"claims\.yaml: 1,000,001 bytes, need at most 1,000,000", id="large"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(text, said, tmp_path):
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_claims(tmp_path / "claims.yaml")
