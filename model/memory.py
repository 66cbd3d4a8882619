"""Bytes that one forward and backward pass holds at a time, from shapes alone; what `torch` saves was counted, see the tests.

Shape letters: N tokens of the packed rows, or a rank's stretch of them, h hidden, f FFN, V vocabulary, e bytes of an activation (2 bf16,
4 fp32).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from configs.layers import LayerAttention
from configs.schema import LossBackend, ModelConfig
from model.ops.full.packed import CUDNN_LENGTH
from model.ops.loss.tiled import tile_tokens
from model.ops.moba.blocked import WORKSPACE_BUDGET
from model.ops.moba.triton.schedule import schedule


@dataclass(frozen=True, kw_only=True)
class PassBytes:
    """What one micro-batch holds on one rank beside weights, gradients and optimizer, in bytes."""

    activations: int
    """Kept on the device for the backward pass by all layers, the embedding and the final norm."""
    host: int
    """Kept in host memory."""
    logits: int
    """Peak of head and loss: logits of a tile of tokens, in plain torch their log-probabilities in fp32, and the gradients of the head."""
    workspace: int
    """Peak of a layer's backward pass beyond `activations`, of which layers whose turn is over have let go: what is computed again,
    gradients of FFN or attention, gate and slots of MoBA; and the gradient of a tied head."""
    gate_and_slots: int
    """What MoBA layers have of their own in it: means, ids of the blocks chosen, and their partial results, or what sorts the ids before
    there are any, if that is more; 0 where no layer is MoBA."""

    @property
    def peak(self) -> int:
        """Head and loss are over when the layers' backward pass begins."""
        return self.activations + max(self.logits, self.workspace)


def pass_bytes(
    config: ModelConfig,
    attention: Sequence[LayerAttention],
    activation: Sequence[str],
    *,
    rows: int,
    seq_len: int,
    itemsize: int,
    gpu: bool,
    triton_workspace: int,
    sequence_parallel: int = 1,
    loss: LossBackend = LossBackend.AUTO,
    ffn_tile: int = 0,
) -> PassBytes:
    """Bytes of forward and backward over `rows` rows that hold one document of `seq_len` tokens each, with the `attention` of each layer
    and what each keeps, its `activation` (`configs.layers.ACTIVATIONS`).

    `itemsize` is e; on a `gpu` RMSNorm is one kernel, on a CPU its steps are saved one by one; `triton_workspace` is what that MoBA
    backend may hold (`moba_attention`), 0 where it is the `torch` backend. `sequence_parallel` ranks share the rows, and the bytes are
    those of one; what an exchange holds while it goes on is left out. `loss` and `ffn_tile` are those of `ParallelConfig`; Liger's loss is
    counted as ours. torch.compile saves less than is reckoned here.
    """
    shapes = _Shapes(
        config=replace(config, num_kv_heads=config.num_kv_heads * config.kv_copies(sequence_parallel)),
        rows=rows,
        seq_len=seq_len,
        itemsize=itemsize,
        gpu=gpu,
        triton_workspace=triton_workspace,
        sequence_parallel=sequence_parallel,
        ffn_tile=ffn_tile,
    )
    kinds = [effective(kind, seq_len) for kind in attention]
    num_tokens = shapes.num_tokens
    kept = [num_tokens * shapes.kept(*layer) for layer in zip(kinds, activation, strict=True)]
    behind = [sum(kept[index + 1 :]) for index in range(len(kept))]  # let go of before a layer's turn comes
    beyond = [shapes.workspace(kind) + num_tokens * shapes.computed_again(kind, word) for kind, word in zip(kinds, activation)]
    # Of whole rows: token ids; cos and sin, which all layers share.
    shared = rows * seq_len * (8 + 4 * config.head_dim)
    waiting = itemsize * config.vocab_size * config.hidden_size if config.tie_embeddings else 0  # the head's gradient, for the embedding's
    return PassBytes(
        activations=sum(kept) + shared + num_tokens * shapes.norm(config.hidden_size),
        host=activation.count("offload") * num_tokens * shapes.input,
        logits=shapes.logits(loss),
        workspace=waiting + max(bytes_held - gone for bytes_held, gone in zip(beyond, behind)),
        gate_and_slots=max(shapes.gate_and_slots(kind) for kind in set(kinds)),
    )


def effective(attention: LayerAttention, seq_len: int) -> LayerAttention:
    """What computes a layer on documents of `seq_len` tokens: a kind that sees all of them is handed over to full attention."""
    return LayerAttention(kind="full") if attention.kind != "full" and reach(attention) >= seq_len else attention


def reach(attention: LayerAttention) -> int:
    """Tokens that a query of a MoBA or sliding layer sees at most."""
    return attention.topk * attention.block_size if attention.kind == "moba" else attention.window


@dataclass(frozen=True, kw_only=True)
class _Shapes:
    config: ModelConfig
    rows: int
    seq_len: int
    itemsize: int
    gpu: bool
    triton_workspace: int
    sequence_parallel: int
    ffn_tile: int

    @property
    def triton(self) -> bool:
        return self.triton_workspace > 0

    @property
    def num_tokens(self) -> int:
        return self.rows * self.seq_len // self.sequence_parallel

    @property
    def q_size(self) -> int:
        return self.config.num_heads * self.config.head_dim

    @property
    def kv_size(self) -> int:
        return self.config.num_kv_heads * self.config.head_dim

    @property
    def is_joined(self) -> bool:
        """Whether full attention goes document by document (`model.ops.full`)."""
        return self.rows > 1 and not (self.gpu and self.itemsize == 2 and self.seq_len < CUDNN_LENGTH)

    def is_unfused(self, attention: LayerAttention) -> bool:
        """Whether a layer holds the weights of its attention, `[Hq, S, S]` of a document of S tokens: for fp32 on a GPU PyTorch has one
        fused kernel, the memory-efficient one, which does not take query heads that share keys."""
        return attention.kind == "full" and self.gpu and self.itemsize == 4 and self.config.num_heads != self.config.num_kv_heads

    def norm(self, width: int, heads: int = 1) -> int:
        """Per token: RMSNorm's output, 1/rms in fp32, and its input; where it is no kernel, input and quotient in fp32."""
        return width * (2 * self.itemsize if self.gpu else self.itemsize + 8) + 4 * heads

    @property
    def is_tiled(self) -> bool:
        """Whether the FFN goes by tiles."""
        return 0 < self.ffn_tile < self.num_tokens

    @property
    def widens(self) -> bool:
        """Whether what is computed in fp32 is first copied into it."""
        return not self.gpu and self.itemsize == 2

    def logits(self, loss: LossBackend) -> int:
        """See `PassBytes`."""
        vocab_size, head = self.config.vocab_size, self.config.vocab_size * self.config.hidden_size
        if loss is LossBackend.REFERENCE:
            return 12 * self.num_tokens * vocab_size  # log-probabilities and two gradients of them
        tile = min(self.num_tokens, tile_tokens(vocab_size, self.itemsize)) * vocab_size
        scores = 0 if self.gpu and loss is not LossBackend.TORCH else 4 * tile
        if self.widens:
            scores *= 2
        return self.itemsize * tile + scores + 4 * head + self.itemsize * self.num_tokens * self.config.hidden_size

    @property
    def input(self) -> int:
        """Bytes per token of a layer's input."""
        return self.itemsize * self.config.hidden_size

    def kept(self, attention: LayerAttention, activation: str) -> int:
        """Bytes per token that one layer keeps on the device."""
        if activation == "selective" and not self.is_unfused(attention):  # which is no operator whose output it keeps
            return self.input + self.itemsize * self.q_size + self.log_sum_exp_and_ids(attention)
        return {"none": self.layer(attention), "selective": self.input, "full": self.input, "offload": 0}[activation]

    def computed_again(self, attention: LayerAttention, activation: str) -> int:
        """Bytes per token that are there again, of what one layer did not keep, when its backward pass begins."""
        ahead = self.input if activation == "offload" else 0  # the input of the layer whose turn is next
        return self.layer(attention) - self.kept(attention, activation) + ahead

    def log_sum_exp_and_ids(self, attention: LayerAttention) -> int:
        """Bytes per token that attention saves besides q, k, v and its output."""
        ids = self.config.num_heads * self.slots(attention) * (4 if self.triton else 8) if attention.kind == "moba" else 0
        return 4 * self.config.num_heads + ids

    def layer(self, attention: LayerAttention) -> int:
        """Bytes per token that one layer saves where nothing is computed again."""
        config = self.config
        # Rotated q and k, v, the attention's output; the FFN's gate, silu(gate), up and their product.
        wide = 2 * self.q_size + 2 * self.kv_size + (0 if self.is_tiled else 4 * config.ffn_size)
        saved = 2 * self.norm(config.hidden_size) + self.log_sum_exp_and_ids(attention)
        if config.qk_norm:  # the norms' outputs are rotated, not saved
            saved += self.norm(self.q_size, config.num_heads) + self.norm(self.kv_size, config.num_kv_heads)
            wide -= self.q_size + self.kv_size
        if config.key_conv:
            saved += 8 * self.sequence_parallel  # the place in its document of each token of whole rows
            wide += 2 * self.kv_size  # keys before the convolution, and before its SiLU
        if self.is_unfused(attention):  # weights in place of log-sum-exp and output; k and v copied for each query head
            return saved + 4 * config.num_heads * (self.seq_len - 1) + self.itemsize * (wide + 2 * (self.q_size - self.kv_size))
        joined = (attention.kind == "full" and self.is_joined) or (attention.kind == "moba" and not self.triton)
        if joined or self.sequence_parallel > 1:
            wide += self.q_size  # outputs by document, by group of heads or of all heads by rank come together in a copy
        return saved + self.itemsize * wide

    def workspace(self, attention: LayerAttention) -> int:
        """Bytes that a layer's backward pass holds beyond what its forward pass saved; what it is done with it lets go of."""
        tokens, hidden, ffn_size = self.num_tokens, self.config.hidden_size, self.config.ffn_size
        freed = tokens * self.norm(hidden)  # what the FFN saved, before attention begins
        if self.is_tiled:  # five intermediates of a tile, the fp32 sums of three gradients, the input's gradient
            ffn = self.itemsize * (5 * self.ffn_tile * ffn_size + tokens * hidden) + 12 * ffn_size * hidden
            ffn += 4 * self.ffn_tile * (ffn_size + hidden) if self.widens else 0
        else:
            ffn = 2 * self.itemsize * tokens * ffn_size  # gradients of silu(gate) and up, in place of the product
            freed += 4 * self.itemsize * tokens * ffn_size
        gradients = self.itemsize * tokens * (2 * self.q_size + 2 * self.kv_size)
        if attention.kind != "moba":
            # Three of the size of a document's weights, measured on an H200; fused kernels sum dq in fp32.
            weights = 12 * self.config.num_heads * self.seq_len * (tokens // self.rows) if self.is_unfused(attention) else 0
            return max(ffn, gradients + weights + 4 * tokens * self.q_size - freed)
        copies = 0 if self.triton else 4 * tokens * (2 * self.q_size + 2 * self.kv_size)  # fp32 rows and blocks
        return max(ffn, gradients + self.gate_and_slots(attention) + copies - freed)

    def gate_and_slots(self, attention: LayerAttention) -> int:
        """Bytes of block means (fp32, or two halves), ids of the chosen, and partial results or what sorts the ids, of a MoBA layer."""
        if attention.kind != "moba":
            return 0
        past, head_dim, heads = self.slots(attention), self.config.head_dim, self.num_tokens * self.config.num_heads
        partial = past * head_dim * self.itemsize + 8 * past if self.triton else 4 * (past + 1) * head_dim
        means = 4 * self.num_tokens * self.kv_size // attention.block_size
        held = min(self.triton_workspace or 4 * WORKSPACE_BUDGET, heads * partial)
        return max(held, self.index(attention)) + means + 4 * heads * past

    def index(self, attention: LayerAttention) -> int:
        """Bytes that sorting the chosen by block holds at once, in the Triton backend."""
        if not self.triton:
            return 0
        config, degree = self.config, self.sequence_parallel
        q_shape = (self.rows * self.seq_len, config.num_heads // degree, config.head_dim)
        sizes = {"num_docs": self.rows, "block_size": attention.block_size, "topk": attention.topk, "workspace": self.triton_workspace}
        return schedule(q_shape, config.num_kv_heads // degree, self.itemsize, **sizes).index_bytes

    def slots(self, attention: LayerAttention) -> int:
        """Past blocks that are kept for each query and head."""
        return min(attention.topk, -(-self.seq_len // attention.block_size)) - 1
