"""What each form of knowledge costs to write and to read, and which is the cheapest for so many uses (design sections 1 and 5).

Source: arXiv 2407.01178, Appendix A. Work is in FLOPs, a multiply-add is 2; norms, softmaxes and rotations are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from memory3.spec import MemorySpec, SpecError, UnsupportedModel

TRAIN_LENGTH = 2048
"""Tokens of a training sequence of the paper."""
TEXT_BYTES_PER_TOKEN = 4
"""English in UTF-8, roughly; the bytes of a text are given where they are known."""
SCORED = ("received_attention", "received_attention_unnormalised")
"""Selections that compute attention once more to choose tokens; the work of the others is negligible."""
# fmt: off
UNGATED = frozenset({
    "apertus", "arcee", "biogpt", "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese",
    "gptj", "mpt", "nemotron", "openai-gpt", "opt", "persimmon", "phi", "starcoder2", "xglm",
})
# fmt: on
"""Families whose MLP has two matrices; the others have three, a gate among them."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide what it computes for a token.

    Args:
        layers: `L`.
        hidden: `d`.
        heads: query heads of a layer.
        kv_heads: `H_kv`.
        head_dim: `d_h`.
        mlp: `W`, the width of the MLP; of the experts that one token passes, the sum.
        vocabulary: `V`.
        mlp_matrices: 3 with a gate, else 2.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    mlp_matrices: int = 3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise SpecError(f"found {name}={value!r} in the shape of a decoder, expected a whole number of at least 1")
        if self.heads % self.kv_heads:
            raise SpecError(f"found {self.heads} query heads for {self.kv_heads} kv heads, expected a multiple")

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape that a transformers config asks for.

        Where some layers are dense and others have experts, all are counted as those with experts; routers are left out.

        Raises:
            UnsupportedModel: an encoder-decoder, compressed key-values, or sizes that the config does not name.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        family = str(getattr(text, "model_type", "") or type(text).__name__)
        if unfit := _unfit(config, text):
            raise UnsupportedModel(f"found a config of {family} {unfit}, expected a decoder with self-attention in every layer")
        sizes = [_size(text, name) for name in _NEEDED]
        missing = [name for name, size in zip(_NEEDED, sizes, strict=True) if size is None]
        if missing:
            raise UnsupportedModel(
                f"found a config of {family} without {', '.join(missing)}, expected the sizes of a decoder: give them as a Shape"
            )
        layers, hidden, heads, vocabulary = (size or 0 for size in sizes)
        return cls(
            layers,
            hidden,
            heads,
            kv_heads=_kv_heads(text) or heads,
            head_dim=_size(text, "head_dim") or hidden // heads,
            mlp=_mlp_width(text, hidden),
            vocabulary=vocabulary,
            mlp_matrices=2 if family in UNGATED else 3,
        )

    @property
    def queries(self) -> int:
        """Width of all query heads; `d` in the paper, where both are equal."""
        return self.heads * self.head_dim

    @property
    def group(self) -> int:
        """`G`: query heads of one kv head."""
        return self.heads // self.kv_heads

    @property
    def attention_weights(self) -> int:
        """Weights of the four projections of a layer: `2 d^2 + 2 d d_h H_kv` in the paper."""
        return 2 * self.hidden * (self.queries + self.kv_heads * self.head_dim)

    @property
    def mlp_weights(self) -> int:
        """Weights of the MLP of a layer: `3 d W` in the paper."""
        return self.mlp_matrices * self.hidden * self.mlp

    def low_rank_weights(self, rank: int) -> int:
        """Weights of a layer's adapters: `rank * (inputs + outputs)` of every matrix."""
        attention = 4 * self.hidden + 2 * self.queries + 2 * self.kv_heads * self.head_dim
        return rank * (attention + self.mlp_matrices * (self.hidden + self.mlp))


_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def _unfit(config: Any, text: Any) -> str | None:
    """Why the formulas do not hold for a model."""
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if getattr(config, "is_encoder_decoder", False):
        return "with an encoder"
    if getattr(text, "kv_lora_rank", None):
        return "with compressed key-values"
    return f"with {', '.join(sorted(others))} layers" if others else None


def _size(text: Any, *names: str) -> int | None:
    """The first of these sizes that a config names."""
    for name in names:
        try:
            value = getattr(text, name, None)
        except RuntimeError:  # so transformers says that a size differs between layers
            raise UnsupportedModel(
                f"found a config of {text.model_type} with a {name} for each layer, expected one for all layers"
            ) from None
        if isinstance(value, int) and value:
            return value
    return None


def _kv_heads(text: Any) -> int | None:
    """None where a config has a kv head for every query head."""
    shared = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
    return 1 if shared else _size(text, "num_key_value_heads", "num_kv_heads")


def _mlp_width(text: Any, hidden: int) -> int:
    """The width of the MLP, or of the experts that a token passes."""
    dense = _size(text, "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner") or 4 * hidden
    if _size(text, "num_local_experts", "num_experts", "n_routed_experts") is None:
        return dense
    width = _size(text, "moe_intermediate_size") or dense
    shared = _size(text, "shared_expert_intermediate_size") or (_size(text, "n_shared_experts") or 0) * width
    return (_size(text, "num_experts_per_tok", "experts_per_token") or 1) * width + shared


PRESETS = {
    "paper-2.4b": Shape(44, 3200, 40, 8, 80, 3200, 60416),
    "paper-0.9b": Shape(40, 2048, 32, 8, 64, 2048, 60416),
}
"""The paper's model (2.43e9 parameters without embeddings) and its ablation model (0.92e9; its kv heads and MLP width are inferred, design
section 4), with the names that `--preset` takes."""


def preset(name: str) -> Shape:
    """The shape of that name; `SpecError` lists the known ones."""
    if name not in PRESETS:
        raise SpecError(f"found preset {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


# ---- the formulas; `spec` is resolved, and one reference has `spec.reference_length` tokens ----


def text_read_flops(shape: Shape, spec: MemorySpec, references: int = 1) -> float:
    """Encode a reference in the prompt, and let a chunk attend to it.

    Args:
        shape: of the decoder.
        spec: resolved.
        references: texts that stand in one prompt and attend to those before them; the paper's formula has one.
    """
    ref, chunk = spec.reference_length, spec.chunk_length
    attention = 2 * ref * (references * ref / 2 + chunk) * shape.queries
    layer = ref * shape.attention_weights + attention
    return 2 * (shape.layers * layer + (shape.layers - 1) * ref * shape.mlp_weights)


def memory_write_flops(shape: Shape, spec: MemorySpec) -> float:
    """Run the layers up to the last memory layer, without its MLP, and score the tokens of every memory head."""
    assert spec.layers is not None, "resolve the spec first"
    ref, depth = spec.reference_length, spec.layers[-1] + 1
    layer = ref * shape.attention_weights + 2 * ref**2 / 2 * shape.queries
    scored = spec.selection in SCORED and spec.slots < ref
    scores = spec.pairs * ref**2 * shape.group * shape.head_dim if scored else 0
    return 2 * (depth * layer + (depth - 1) * ref * shape.mlp_weights + scores)


def memory_read_flops(shape: Shape, spec: MemorySpec) -> float:
    """Let a chunk attend to the kept tokens of one reference, at every memory head."""
    return 2 * spec.pairs * 2 * spec.chunk_length * spec.slots * shape.group * shape.head_dim


def parameters_write_flops(shape: Shape, spec: MemorySpec, train_length: int = TRAIN_LENGTH) -> float:
    """Forward and backward over the tokens of a reference, once, inside sequences of `train_length` tokens."""
    ref = spec.reference_length
    layer = ref * (shape.attention_weights + shape.mlp_weights) + 2 * ref * train_length / 2 * shape.queries
    return 6 * (shape.layers * layer + ref * shape.vocabulary * shape.hidden)


def low_rank_write_flops(
    shape: Shape, spec: MemorySpec, rank: int, train_length: int = TRAIN_LENGTH, from_layer: int = 0
) -> float:
    """The same with adapters of this rank beside every matrix from a layer on (Hu et al., arXiv 2106.09685).

    Frozen matrices need no gradient of their own, which leaves 4 of the 6 FLOPs of a weight and token; layers below the first
    adapter only run forward, which leaves 2. Attention has no weights and needs all 6.
    """
    if rank < 1 or not 0 <= from_layer < shape.layers:
        raise SpecError(f"found rank {rank} from layer {from_layer}, expected rank 1 or more and a layer below {shape.layers}")
    ref, above = spec.reference_length, shape.layers - from_layer
    weights = ref * (shape.attention_weights + shape.mlp_weights)
    attention = 2 * ref * train_length / 2 * shape.queries
    below = 2 * from_layer * (weights + attention)
    trained = above * (4 * weights + 6 * attention + 6 * ref * shape.low_rank_weights(rank))
    return below + trained + 4 * ref * shape.vocabulary * shape.hidden


# ---- formats, and the cheapest of them ----


class Costed(Protocol):
    """A format whose cost grows by the same amount with every use, in one unit: FLOPs, seconds or money."""

    @property
    def name(self) -> str: ...

    @property
    def write(self) -> float: ...

    @property
    def read(self) -> float: ...


F = TypeVar("F", bound=Costed)


@dataclass(frozen=True)
class Format:
    """One form of a reference's knowledge: work of writing it once and of each use, and the bytes that it keeps."""

    name: str
    write_flops: float
    read_flops: float
    bytes: int = 0

    @property
    def write(self) -> float:
        """`write_flops`."""
        return self.write_flops

    @property
    def read(self) -> float:
        """`read_flops`."""
        return self.read_flops


@dataclass(frozen=True)
class Timed:
    """The same in seconds of one machine."""

    name: str
    write_s: float
    read_s: float
    bytes: int = 0

    @property
    def write(self) -> float:
        """`write_s`."""
        return self.write_s

    @property
    def read(self) -> float:
        """`read_s`."""
        return self.read_s


@dataclass(frozen=True)
class Priced:
    """The same in money; `write` holds what keeping the bytes costs."""

    name: str
    write: float
    read: float


@dataclass(frozen=True)
class Prices:
    """What a machine and its storage cost.

    Args:
        hour: money for an hour of the machine that computes.
        gb_month: money for keeping 1e9 bytes for a month of 30 days.
        days: how long knowledge is kept; uses are counted over the same time.
    """

    hour: float
    gb_month: float = 0.0
    days: float = 365.0

    def __post_init__(self) -> None:
        if self.hour < 0 or self.gb_month < 0 or self.days <= 0:
            raise SpecError(f"found {self}, expected prices of at least 0 and more than 0 days")

    def of(self, timed: Timed) -> Priced:
        """A format in money."""
        kept = timed.bytes / 1e9 * self.gb_month * self.days / 30
        return Priced(timed.name, timed.write_s / 3600 * self.hour + kept, timed.read_s / 3600 * self.hour)


def timed(format: Format, flops_per_s: float) -> Timed:
    """A format in seconds of a machine that does so many FLOPs in one."""
    if flops_per_s <= 0:
        raise SpecError(f"found {flops_per_s} FLOPs per second, expected more than 0")
    return Timed(format.name, format.write_flops / flops_per_s, format.read_flops / flops_per_s, format.bytes)


def formats(
    shape: Shape,
    spec: MemorySpec | None = None,
    *,
    record_bytes: int,
    text_bytes: int | None = None,
    rank: int | None = None,
    from_layer: int = 0,
    references: int = 1,
    train_length: int = TRAIN_LENGTH,
    passes: int = 1,
) -> tuple[Format, ...]:
    """The forms of one reference: text, memory, low-rank where a rank is given, and parameters, in this order.

    Args:
        shape: of the decoder.
        spec: of its memories; `None` is the paper's.
        record_bytes: what a memory keeps on disk beside its text, as `Codec.record_bytes` says it.
        text_bytes: of the reference in UTF-8; by default four a token.
        rank: of adapters, for a format `low-rank`.
        from_layer: the first layer with adapters.
        references: texts of one prompt.
        train_length: tokens of a training sequence.
        passes: times that training sees the reference; the paper's formula has one.

    Raises:
        SpecError: a number out of range, or a spec that does not fit the shape.
    """
    numbers = {"references": references, "train_length": train_length, "passes": passes, "record_bytes": record_bytes}
    for name, value in numbers.items():
        if value < 1:
            raise SpecError(f"found {name}={value}, expected at least 1")
    spec = (spec or MemorySpec()).resolved(shape.layers, shape.kv_heads)
    text = TEXT_BYTES_PER_TOKEN * spec.reference_length if text_bytes is None else text_bytes
    found = [
        Format("text", 0.0, text_read_flops(shape, spec, references), text),
        Format("memory", memory_write_flops(shape, spec), memory_read_flops(shape, spec), text + record_bytes),
    ]
    if rank is not None:
        write = passes * low_rank_write_flops(shape, spec, rank, train_length, from_layer)
        found.append(Format("low-rank", write, 0.0))
    return (*found, Format("parameters", passes * parameters_write_flops(shape, spec, train_length), 0.0))


def total(uses: float, format: Costed) -> float:
    """`write + uses * read`."""
    return format.write + uses * format.read


def cheapest(uses: float, formats: Sequence[F]) -> F:
    """The format that minimises `write + uses * read` (Eq. 1). Ties go to the first."""
    if not formats or not uses >= 0:
        raise SpecError(f"found {uses} uses of {len(formats)} formats, expected at least 0 uses and one format")
    return min(formats, key=lambda f: total(uses, f))


def least_total(uses: Iterable[float], formats: Sequence[Costed]) -> float:
    """Equation 1: every piece of knowledge in its cheapest format, summed over their uses."""
    return sum(total(n, cheapest(n, formats)) for n in uses)


def three_digits(value: float) -> str:
    """`0.494`, `13,400`, `1.44e+08`: for people."""
    return f"{float(f'{value:.3g}'):,g}" if value < 1e6 else f"{value:.3g}"


@dataclass(frozen=True)
class Interval:
    """A format is cheapest between so many uses, the ends included; `most` is infinite for the last one."""

    name: str
    least: float
    most: float


def intervals(formats: Sequence[Costed]) -> list[Interval]:
    """The interval of uses in which each format is cheapest, by uses: the lower hull of their lines.

    A format that is never cheapest has none, and one that is so at a single point neither.
    """
    now = min(formats, key=lambda f: (f.write, f.read), default=None)
    if now is None:
        raise SpecError("found no format, expected at least one")
    least, found = 0.0, list[Interval]()
    while True:
        meets = [((f.write - now.write) / (now.read - f.read), f.read, n) for n, f in enumerate(formats) if f.read < now.read]
        if not meets:
            return [*found, Interval(now.name, least, float("inf"))]
        most, _, n = min(meets)
        most = max(least, most)  # rounding may say less where three lines meet
        found.append(Interval(now.name, least, most))
        least, now = most, formats[n]
