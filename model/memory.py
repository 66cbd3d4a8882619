"""Bytes that one forward and backward pass holds at a time, from shapes alone; what `torch` saves was counted, see the tests.

Shape letters: N tokens of the packed rows, or a rank's stretch of them, h hidden, f FFN, V vocabulary, e bytes of an activation (2 bf16,
4 fp32).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from configs.layers import LayerAttention
from configs.schema import ModelConfig
from model.ops.full.packed import CUDNN_LENGTH
from model.ops.moba.blocked import WORKSPACE_BUDGET
from model.transformer import LOGITS_BUDGET


@dataclass(frozen=True, kw_only=True)
class PassBytes:
    """What one micro-batch holds on one rank beside weights, gradients and optimizer, in bytes."""

    activations: int
    """Saved for the backward pass by all layers, the embedding and the final norm."""
    logits: int
    """Peak of head and loss in the backward pass: log-probabilities and two gradients of them in fp32, of one piece of the tokens."""
    workspace: int
    """Peak of a layer's backward pass beyond what is saved: gradients of FFN or attention, gate and slots of MoBA."""
    gate_and_slots: int
    """What MoBA layers have of their own in it: means, ids and partial results of the blocks chosen; 0 where no layer is MoBA."""

    @property
    def peak(self) -> int:
        """The head's backward pass is over when the layers' begins."""
        return self.activations + max(self.logits, self.workspace)


def pass_bytes(
    config: ModelConfig,
    attention: Sequence[LayerAttention],
    *,
    rows: int,
    seq_len: int,
    itemsize: int,
    gpu: bool,
    triton_workspace: int,
    sequence_parallel: int = 1,
) -> PassBytes:
    """Bytes of forward and backward over `rows` rows that hold one document of `seq_len` tokens each, with the `attention` of each layer.

    `itemsize` is e; on a `gpu` RMSNorm is one kernel, on a CPU its steps are saved one by one; `triton_workspace` is what that MoBA
    backend may hold (`moba_attention`), 0 where it is the `torch` backend. Nothing is checkpointed but the pieces of the loss.
    `sequence_parallel` ranks share the rows, and the bytes are those of one; what an exchange holds while it goes on is left out.
    """
    shapes = _Shapes(
        config=replace(config, num_kv_heads=config.num_kv_heads * config.kv_copies(sequence_parallel)),
        rows=rows,
        seq_len=seq_len,
        itemsize=itemsize,
        gpu=gpu,
        triton_workspace=triton_workspace,
        sequence_parallel=sequence_parallel,
    )
    kinds = [effective(kind, seq_len) for kind in attention]
    num_tokens = shapes.num_tokens
    # Of whole rows: token ids; cos and sin, which all layers share.
    shared = rows * seq_len * (8 + 4 * config.head_dim)
    piece = min(num_tokens, max(1, LOGITS_BUDGET // config.vocab_size))
    head = itemsize * config.vocab_size * config.hidden_size if piece < num_tokens else 0  # the weight's gradient, summed over pieces
    return PassBytes(
        activations=shared + num_tokens * (sum(shapes.layer(kind) for kind in kinds) + shapes.norm(config.hidden_size)),
        logits=12 * piece * config.vocab_size + head,
        workspace=max(shapes.workspace(kind) for kind in set(kinds)),
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

    def norm(self, width: int, heads: int = 1) -> int:
        """Per token: RMSNorm's output, 1/rms in fp32, and its input; where it is no kernel, input and quotient in fp32."""
        return width * (2 * self.itemsize if self.gpu else self.itemsize + 8) + 4 * heads

    def layer(self, attention: LayerAttention) -> int:
        """Bytes per token that one layer saves."""
        config = self.config
        # Rotated q and k, v, the attention's output; the FFN's gate, silu(gate), up and their product.
        wide = 2 * self.q_size + 2 * self.kv_size + 4 * config.ffn_size
        saved = 2 * self.norm(config.hidden_size) + 4 * config.num_heads  # and the log-sum-exp
        if config.qk_norm:  # the norms' outputs are rotated, not saved
            saved += self.norm(self.q_size, config.num_heads) + self.norm(self.kv_size, config.num_kv_heads)
            wide -= self.q_size + self.kv_size
        if config.key_conv:
            saved += 8 * self.sequence_parallel  # the place in its document of each token of whole rows
            wide += 2 * self.kv_size  # keys before the convolution, and before its SiLU
        if attention.kind == "moba":
            saved += config.num_heads * self.slots(attention) * (4 if self.triton else 8)
        joined = (attention.kind == "full" and self.is_joined) or (attention.kind == "moba" and not self.triton)
        if joined or self.sequence_parallel > 1:
            wide += self.q_size  # outputs by document, by group of heads or of all heads by rank come together in a copy
        return saved + self.itemsize * wide

    def workspace(self, attention: LayerAttention) -> int:
        """Bytes that the backward pass of the last layer holds beyond what all layers saved; what it is done with it lets go of."""
        tokens, ffn_size = self.num_tokens, self.config.ffn_size
        ffn = 2 * self.itemsize * tokens * ffn_size  # gradients of silu(gate) and up, in place of the product
        freed = tokens * (4 * self.itemsize * ffn_size + self.norm(self.config.hidden_size))  # the FFN's, before attention begins
        gradients = self.itemsize * tokens * (2 * self.q_size + 2 * self.kv_size)
        if attention.kind != "moba":
            return max(ffn, gradients + 4 * tokens * self.q_size - freed)  # fused kernels sum dq in fp32
        copies = 0 if self.triton else 4 * tokens * (2 * self.q_size + 2 * self.kv_size)  # fp32 rows and blocks
        return max(ffn, gradients + self.gate_and_slots(attention) + copies - freed)

    def gate_and_slots(self, attention: LayerAttention) -> int:
        """Bytes of block means (fp32, or two halves), ids of the chosen, and partial results, of a MoBA layer."""
        if attention.kind != "moba":
            return 0
        past, head_dim, heads = self.slots(attention), self.config.head_dim, self.num_tokens * self.config.num_heads
        partial = past * head_dim * self.itemsize + 8 * past if self.triton else 4 * (past + 1) * head_dim
        means = 4 * self.num_tokens * self.kv_size // attention.block_size
        return min(self.triton_workspace or 4 * WORKSPACE_BUDGET, heads * partial) + means + 4 * heads * past

    def slots(self, attention: LayerAttention) -> int:
        """Past blocks that are kept for each query and head."""
        return min(attention.topk, -(-self.seq_len // attention.block_size)) - 1
