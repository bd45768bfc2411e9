"""The parts of the README that are made from results: `make readme` writes them, a test compares them."""

import json
import re
from pathlib import Path

import pandas as pd

from apexlib.claims import claims_table, read_claims

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data" / "results" / "cpu"


def claims() -> str:
    """The ledger's verdicts on the default run."""
    ledger = read_claims(ROOT / "data" / "claims.yaml")
    lines = ["| claim | measured: mean [95 % interval] | seeds | verdict |", "|---|---|---|---|"]
    for row in claims_table(RESULTS).itertuples():
        unit = ledger[row.claim]["unit"].replace("none", "").replace("nats per token", " nats")
        number = f"{row.mean:+.3f} [{row.low:+.3f}, {row.high:+.3f}]{unit}"
        lines.append(f"| {row.statement} | {number} | {row.n} | **{row.verdict}** |")
    return "\n".join(lines)


def run() -> str:
    """Where, with what and how long the default run was made."""
    manifest = json.loads((RESULTS / "manifest.json").read_text(encoding="utf-8"))
    facts = json.loads((RESULTS / "models.json").read_text(encoding="utf-8"))
    models = pd.read_csv(RESULTS / "models.csv")
    final = models[models["step"] == models["step"].max()].groupby("model")
    losses = ", ".join(
        f"{name} ({int(part['parameters'].iloc[0]):,} parameters) {part['loss'].mean():.2f}"
        for name, part in sorted(final, key=lambda item: item[1]["parameters"].iloc[0])
    )
    minutes = sum(entry["seconds"] for entry in manifest["notebooks"].values()) / 60
    versions = facts["versions"]
    return (
        f"Run on {facts['device']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"Python {facts['python']}: {minutes:.1f} minutes for {len(manifest['notebooks'])} notebooks. Held-out loss in "
        f"nats per token after {models['tokens'].max() / 1e6:.1f} million tokens: {losses}; token frequencies alone "
        f"{facts['unigram_loss']:.2f}."
    )


SECTIONS = {"claims": claims, "run": run}


def rendered(text: str) -> str:
    """Fill every section of `text` between its markers."""
    for name, make in SECTIONS.items():
        start, end = f"<!-- {name}: made by `make readme` -->\n", f"\n<!-- end of {name} -->"
        text, n = re.subn(
            re.escape(start) + ".*?" + re.escape(end), lambda _, s=start, e=end, m=make: s + m() + e, text, flags=re.S
        )
        if n != 1:
            raise ValueError(f"README.md has {n} sections {name!r}: need one")
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
