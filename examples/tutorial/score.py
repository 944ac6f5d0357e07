"""Hold answers of `memory3 ask --questions FILE --json` against what is right.

python score.py world/questions.jsonl answers.jsonl …
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from memory3.scoring import exact_match, interval


def rows(file: str) -> list[dict[str, Any]]:
    """Objects of a JSONL file."""
    return [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]


def main(questions: str, *answers: str) -> None:
    """Print for each file the share of exact answers with its 95 % interval, and of answers that cite the right note first."""
    asked = rows(questions)
    for file in answers:
        said = rows(file)
        right = [exact_match(a["answer"].split("\n")[0], q["answers"]) for q, a in zip(asked, said, strict=True)]
        cited = [any(Path(c["source"]).name == q["note"] for c in a["citations"][:1]) for q, a in zip(asked, said, strict=True)]
        low, high = interval(right)
        print(
            f"{file}: {sum(right):.0f} of {len(asked)} right, {100 * sum(right) / len(asked):.0f} % [{100 * low:.0f}, "
            f"{100 * high:.0f}]; the right note cited first: {100 * sum(cited) / len(asked):.0f} %"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
