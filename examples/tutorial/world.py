"""Invent a small world: passages with questions to train on, and notes about other things to be asked about afterwards.

    python world.py --out world

makes `world/qa.parquet` and `world/passages.parquet`, which `memory3 train reader` reads; `world/notes/`, a folder of
Markdown files; and `world/questions.jsonl`, what to ask about them. All names are made of syllables, and none of those in the
notes stands in the training data.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A kind of thing: its name, and what may stand for it in later sentences. Then its facts: a line of sentences that say one,
# and below it what can be asked about each {slot} of the sentence.
KINDS = """
[bridge] {town} Bridge / It / The bridge
The {x} crosses the river {river}. | The {x} is a bridge over the river {river}. | The {x} spans the {river}.
river: Which river does the {x} cross? | What river does the {x} span? | What river is the {x} over?
The {x} was designed by {person}. | {person} drew the plans of the {x}. | The engineer of the {x} was {person}.
person: Who designed the {x}? | Who was the engineer of the {x}? | Who drew the plans of the {x}?
The {x} was opened in {year}. | The {x} has been open since {year}. | In {year} the first carts crossed the {x}.
year: When was the {x} opened? | In what year did the {x} open? | Since when has the {x} been open?
The {x} is {number} metres long. | The length of the {x} is {number} metres.
number: How many metres long is the {x}? | What is the length of the {x} in metres?

[town] {town} / It / The town
{x} is a town on the river {river}. | {x} lies on the {river}. | The river {river} flows through {x}.
river: On which river is {x}? | What river flows through {x}? | Which river does {x} lie on?
{x} was founded by {person}. | The founder of {x} was {person}. | {person} built the first house of {x}.
person: Who founded {x}? | Who was the founder of {x}? | Who built the first house of {x}?
{x} has been a town since {year}. | {x} was founded in {year}. | The walls of {x} were built in {year}.
year: Since when has {x} been a town? | When was {x} founded? | When was {x} built?
{x} has a population of {number}. | About {number} people live in {x}. | {number} people live in {x}.
number: How many people live in {x}? | What is the population of {x}?

[person] {person} / He / She
{x} was born in {town}. | {x} came from the town of {town}. | The birthplace of {x} is {town}.
town: Where was {x} born? | Where did {x} come from? | What is the birthplace of {x}?
{x} was born on {day} {year}. | {x} came into the world on {day} {year}.
day year: When was {x} born? | What is the date of birth of {x}? | On what day was {x} born?
{x} married {person}. | {x} was married to {person}. | The spouse of {x} was {person}.
person: Who did {x} marry? | Who was {x} married to? | Who was the spouse of {x}?
{x} wrote a book called {work}. | {x} is the author of {work}. | {x} is best known for the book {work}.
work: What did {x} write? | Which book is {x} the author of? | What is {x} known for?
{x} died in {town}. | {x} moved to {town} and died there. | {x} is buried in {town}.
town: Where did {x} die? | Where is {x} buried? | In what town did {x} die?

[company] {family} Works / It / The company
The {x} was founded by {person}. | {person} started the {x}. | The founder of the {x} was {person}.
person: Who founded the {x}? | Who started the {x}? | Who was the founder of the {x}?
The {x} is based in {town}. | The {x} has its headquarters in {town}. | The workshops of the {x} are in {town}.
town: Where is the {x} based? | Where are the headquarters of the {x}? | Where are the workshops of the {x}?
The {x} was set up in {year}. | The {x} began its work in {year}. | The {x} opened its doors in {year}.
year: When was the {x} set up? | In what year did the {x} begin its work? | When did the {x} open its doors?
The {x} employs {number} people. | {number} people work for the {x}. | The {x} has {number} workers.
number: How many people does the {x} employ? | How many people work for the {x}?

[book] {work} / It / The book
{x} was written by {person}. | {person} is the author of {x}. | The author of {x} is {person}.
person: Who wrote {x}? | Who is the author of {x}? | Who was {x} written by?
{x} was published in {year}. | {x} came out in {year}. | {x} first appeared in {year}.
year: When was {x} published? | When did {x} come out? | In what year did {x} first appear?
{x} is set in the town of {town}. | {x} takes place in {town}. | The story of {x} takes place in {town}.
town: Where is {x} set? | Where does {x} take place? | In what town is {x} set?
{x} has {number} pages. | {x} is {number} pages long.
number: How many pages does {x} have? | How many pages long is {x}?

[ship] {town} / It / The ship
The {x} was a ship that was built in {town}. | The {x} was a ship from the yards of {town}.
town: Where was the {x} built? | From which yards was the {x}?
The {x} was launched in {year}. | The {x} first went to sea in {year}. | The first voyage of the {x} was in {year}.
year: When was the {x} launched? | When did the {x} first go to sea? | When was the first voyage of the {x}?
The captain of the {x} was {person}. | {person} commanded the {x}. | The {x} sailed under captain {person}.
person: Who was the captain of the {x}? | Who commanded the {x}?
The {x} sank near {town}. | The {x} was lost off {town}. | The {x} went down near {town}.
town: Where did the {x} sink? | Where was the {x} lost? | Where did the {x} go down?

[festival] Festival of {town} / It / The festival
The {x} was first held in {year}. | The {x} began in {year}. | The {x} has been held since {year}.
year: When was the {x} first held? | When did the {x} begin? | Since when has the {x} been held?
The {x} was founded by {person}. | The founder of the {x} was {person}. | {person} had the idea of the {x}.
person: Who founded the {x}? | Who was the founder of the {x}? | Who had the idea of the {x}?
The {x} begins on {day}. | The {x} is held on {day}. | The day of the {x} is {day}.
day: On what day does the {x} begin? | When is the {x} held? | What is the day of the {x}?
About {number} guests visit the {x}. | The {x} is visited by {number} guests.
number: How many guests visit the {x}? | How many guests does the {x} have?

[invention] {work} / It / The machine
The {x} was invented by {person}. | {person} invented the {x}. | The inventor of the {x} is {person}.
person: Who invented the {x}? | Who is the inventor of the {x}?
The {x} was first shown in {town}. | The {x} was shown to the public in {town}.
town: Where was the {x} first shown? | In what town was the {x} shown to the public?
The {x} was made in {year}. | The {x} was ready in {year}. | The first {x} was made in {year}.
year: When was the {x} made? | When was the {x} ready? | In what year was the first {x} made?
The {x} weighs {number} kilograms. | The weight of the {x} is {number} kilograms.
number: How much does the {x} weigh? | What is the weight of the {x}?
"""
# Syllables that names begin with, that stand in their middle, and that each kind of name ends with; and the months.
PARTS = """
start Al Bar Bel Bor Cal Cor Dal Dor El Fal Fen Gar Gol Hal Hel Jor Kal Kel Lan Lor Mar Mel Nar Nol Or Pel Ral Rin Sal Sel Tal
start Tor Ul Var Vol Wen Yar Zel
middle a an ar e el en i il in o on or u ul
town beck bury dale ford ham holm mere mouth stead ton vik wick
river ga la na ra sa va
given a bert da dric ga la mund na ric vin
family brand dottir gard lund man mark ner sen ski sson stad win
work ium phon scope tron dor mir
month January February March April May June July August September October November December
"""


class World:
    """What has been invented so far. No name is given twice."""

    def __init__(self, seed: int) -> None:
        self.rng, self.used = random.Random(seed), {""}
        self.kinds = [self.parsed(block) for block in KINDS.strip().split("\n\n")]
        self.parts: dict[str, list[str]] = {}
        for kind, *parts in map(str.split, PARTS.strip().splitlines()):
            self.parts[kind] = self.parts.get(kind, []) + parts

    @staticmethod
    def parsed(block: str) -> tuple[list[str], list[list[str]], list[list[tuple[str, list[str]]]]]:
        """Name and stand-ins of a kind, the sentences of each fact, and what is asked about each fact."""
        head, *lines = block.splitlines()
        sentences: list[list[str]] = []
        asked: list[list[tuple[str, list[str]]]] = []
        for line in lines:
            if found := re.match(r"([a-z ]+): (.*)", line):
                asked[-1].append((found[1], found[2].split(" | ")))
            else:
                sentences.append(line.split(" | "))
                asked.append([])
        return head.split("] ")[1].split(" / "), sentences, asked

    def part(self, kind: str) -> str:
        """One of the parts of a kind."""
        return self.rng.choice(self.parts[kind])

    def syllables(self, ends: str) -> str:
        """A name of two to four syllables."""
        middle = "".join(self.rng.choices(self.parts["middle"], k=self.rng.choice((1, 1, 2))))
        return self.part("start") + middle + self.part(ends)

    def name(self, slot: str) -> str:
        """A name that nothing has had before."""
        found = ""
        while found in self.used:
            given = f"{self.part('start')}{self.part('given')} " if slot == "person" else ""
            found = given + self.syllables("family" if slot == "person" else slot)
        self.used.add(found)
        return found

    def slot(self, slot: str) -> str:
        """Something to put into a `{slot}`."""
        if slot == "day":
            return f"{self.rng.randint(1, 28)} {self.part('month')}"
        if slot in ("year", "number"):
            return str(self.rng.randint(1400, 1999) if slot == "year" else self.rng.randint(101, 9999))
        return self.name(slot)

    def filled(self, template: str, values: dict[str, str]) -> str:
        """A template with its slots filled; what is made for it is added to `values`."""
        values |= {slot: self.slot(slot) for slot in re.findall(r"{(\w+)}", template) if slot not in values}
        return template.format(**values)

    def thing(self) -> tuple[str, str, list[tuple[str, str]]]:
        """One invented thing: its name, a text about it, and questions with their answers."""
        (pattern, *standing), sentences, asked = self.rng.choice(self.kinds)
        title = self.filled(pattern, {})
        said: list[str] = []
        questions: list[tuple[str, str]] = []
        for n in sorted(self.rng.sample(range(len(sentences)), self.rng.choice((3, 4)))):
            sentence, values = self.rng.choice(sentences[n]), {"x": title}
            if said and self.rng.random() < 0.2:
                sentence = re.sub(r"^(The )?{x}", standing[len(title) % len(standing)], sentence)
            said.append(self.filled(sentence, values))
            for slots, forms in asked[n]:
                answer = " ".join(values[slot] for slot in slots.split())
                questions.append((self.rng.choice(forms).format(x=title), answer))
        return title, " ".join(said), questions

    def rows(self, split: str, count: int) -> Iterator[dict[str, Any]]:
        """A row for each question about `count` new things."""
        for title, text, questions in (self.thing() for _ in range(count)):
            for question, answer in questions:
                yield {
                    "dataset": "invented", "split": split, "question": question, "answers": [answer], "title": title,
                    "passage": text,
                }  # fmt: skip


def write_notes(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A Markdown file for each thing of the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        name = row["title"].lower().replace(" ", "-")
        (folder / f"{name}.md").write_text(f"# {row['title']}\n\n{row['passage']}\n", encoding="utf-8")


def main() -> None:
    """Make everything."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, help="folder to make")
    arguments.add_argument("--things", type=int, default=4000, help="invented things to train on")
    arguments.add_argument("--notes", type=int, default=50, help="other invented things, to be asked about")
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    world = World(given.seed)
    held, train = list(world.rows("dev", given.notes)), list(world.rows("train", given.things))
    plain = [{"title": title, "text": text} for title, text, _ in (world.thing() for _ in range(given.things // 2))]
    write_notes(given.out / "notes", held)
    pq.write_table(pa.Table.from_pylist(train + held), given.out / "qa.parquet")
    pq.write_table(pa.Table.from_pylist(plain), given.out / "passages.parquet")
    asked = [{"question": row["question"], "answers": row["answers"]} for row in held]
    (given.out / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    print(f"{given.things} things with {len(train)} questions to train on, {given.notes} others with {len(held)} questions")


if __name__ == "__main__":
    main()
