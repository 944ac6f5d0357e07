"""The row list is the architecture: a file imports only from rows above its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import memory3

PACKAGE = Path(memory3.__file__).parent
ROWS = [
    ["spec", "quiet", "precision", "fused", "bench.turns", "bench.peers.worker", "bench.peers.gguf_export"],
    [
        "attention",
        "cache",
        "cost",
        "uses",
        "rotation",
        "identity",
        "selection",
        "bench.machine",
        "bench.peers.venvs",
        "documents",
        "shards",
        "embedding",
        "tables",
        "context",
        "rows",
        "record",
        "packing",
    ],
    ["vectorwise", "codebook", "bench.peers.process"],
    ["integers", "rotated", "product"],
    ["codec"],
    ["family", "states", "manifest", "splitting"],
    ["catalogue"],
    ["journal", "guard", "reader", "encoding"],
    ["decoder", "bank"],
    ["tiers"],
    ["writing", "loading", "sampling", "verifying", "archive", "remote", "internal"],
    ["retrieval"],
    ["recall", "rebuilding", "sharing", "fitting"],
    ["generation", "scoring"],
    ["answering"],
    [
        "train.tokenizer",
        "train.settings",
        "train.initialise",
        "train.questions",
        "train.recalled",
        "train.meanings",
        "evaluate.outcomes",
        "evaluate.asking",
        "probe.facts",
        "probe.edges",
    ],
    ["train.kept"],
    [
        "train.optimizers",
        "train.thinning",
        "train.spikes",
        "train.shapes",
        "train.figures",
        "train.passages",
        "train.grid",
        "train.corpus",
        "evaluate.reading",
        "evaluate.harness",
        "evaluate.utility",
    ],
    [
        "bench.scenes",
        "train.checkpoint",
        "train.retrieved",
        "train.instruct",
        "forwarding",
        "train.reading",
        "evaluate.given",
        "evaluate.retrieval",
        "evaluate.masking",
    ],
    [
        "train.loop",
        "train.sequences",
        "train.preference",
        "train.prompted",
        "train.recipe",
        "evaluate.arms",
        "evaluate.use",
        "evaluate.heads",
        "evaluate.ann",
        "evaluate.fusion",
    ],
    ["train.teaching", "evaluate.likelihood", "evaluate.speed", "probe.heads", "probe.answers"],
    ["train.convert", "train.inputs", "evaluate.variations", "probe.knowledge"],
    ["train.recipes", "evaluate.picture", "evaluate.retraining"],
    ["bench.report"],
    [
        "train.stages",
        "bench.decoding",
        "bench.encoding",
        "bench.recalls",
        "bench.codecs",
        "bench.peers.measuring",
        "evaluate.demo",
        "evaluate.qa",
        "evaluate.beginning",
        "probe.picture",
    ],
    ["evaluate.ablations", "evaluate.found"],
    ["hierarchy.sizes", "hierarchy.planning", "hierarchy.measuring", "hierarchy.phrasings"],
    [
        "hierarchy.picture",
        "hierarchy.trace",
        "hierarchy.recollection",
        "hierarchy.consolidation",
        "hierarchy.applying",
    ],
    ["hierarchy.replay", "hierarchy.comparison"],
    ["hierarchy.policies", "hierarchy.optimum"],
    ["hierarchy.simulation"],
    ["hierarchy.curves"],
    ["cli.common"],
    ["cli.hierarchy", "cli.consolidation", "cli.commands", "cli.bank", "cli.train", "cli.evaluate", "cli.probe"],
    ["cli.bench"],
    ["cli"],
    ["__main__"],
]
SAME_ROW = {("evaluate.reading", "evaluate.picture"), ("evaluate.picture", "evaluate.reading")}
"""Imports that no row explains: a type or a function-local import, each named here."""
RANK = {module: rank for rank, row in enumerate(ROWS) for module in row}


def modules() -> dict[str, Path]:
    found = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    packages = {name.removesuffix(".__init__"): path for name, path in found.items() if name.endswith(".__init__")}
    found = {name: path for name, path in found.items() if not name.endswith("__init__")}
    return found | {name: path for name, path in packages.items() if len(ast.parse(path.read_text()).body) > 1}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("memory3."):
            names.add(node.module.removeprefix("memory3."))
    return names


def test_every_module_has_its_row_and_imports_only_from_rows_above() -> None:
    found = modules()
    assert set(found) == set(RANK)
    wrong = [
        (name, other)
        for name, path in found.items()
        for other in imported(path)
        if RANK[other] >= RANK[name] and (name, other) not in SAME_ROW
    ]
    assert wrong == []


def test_no_module_bears_the_name_of_a_public_function() -> None:
    assert not {name.rpartition(".")[2] for name in modules()} & set(memory3.__all__)


def test_no_file_swallows_everything() -> None:
    assert {n: c for n, p in modules().items() if (c := len(p.read_text().splitlines())) > 450} == {}


def test_nothing_is_unpickled_or_executed() -> None:
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {a.name for a in node.names} & {"pickle", "marshal", "shelve", "dill"}
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "torch.save", "compile"), path


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = "import sys, memory3.cli; print(sorted({'torch', 'transformers', 'lancedb', 'pyarrow', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_public_can_be_imported() -> None:
    for name in memory3.__all__:
        assert getattr(memory3, name) is not None
