"""How a call is cut so that what it holds at once fits in the workspace: arithmetic on sizes, which needs no Triton.

Shape letters as in `plan.py`.
"""

from dataclasses import dataclass

from model.ops.moba.triton.limits import MOST_SORTED, most_blocks

# A list of queries longer than this many times the mean is split over programs: trained models have blocks that most queries choose.
SPLIT = 4


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Heads in groups, and queries in ranges where need be."""

    num_slots: int
    """P, at most: documents may have fewer past blocks."""
    max_blocks: int
    """N, at most."""
    heads: int
    """Query heads of a group."""
    num_groups: int
    listed: int
    """Query heads of a group whose choices are made and sorted together; they divide `heads`."""
    chunk: int
    """Queries whose choices are sorted on chip."""
    tokens: int
    """Queries of a range, a multiple of `chunk`."""
    num_ranges: int
    index_bytes: int
    """What choosing and sorting hold at once, over before a slot is there. More than the workspace where one head's are."""


def schedule(
    q_shape: tuple[int, ...], num_kv: int, itemsize: int, *, num_docs: int, block_size: int, topk: int, workspace: int
) -> Schedule:
    """The cut for q `[T, Hq, D]`; it depends on sizes alone, so that the shapes of what is saved are known before any value is.

    A slot holds a partial output, later a partial gradient, of one query for one past block. `workspace` counts bytes.
    """
    num_tokens, num_heads, head_dim = q_shape
    group = num_heads // num_kv
    max_blocks = most_blocks(num_tokens, num_docs, block_size)
    num_slots = min(topk, max_blocks) - 1
    slots = power_of_2(max(1, num_slots))
    sorted_together = 1024 if num_tokens < 1 << 18 else MOST_SORTED  # the counts grow as blocks x chunks
    chunk = max(16, sorted_together // slots)
    per_token = num_slots * head_dim * itemsize + max(4 * num_slots, 8 * head_dim // SPLIT)
    fit = max(1, workspace // (num_tokens * per_token) // group)
    groups = next(n for n in range(1, num_kv + 1) if num_kv % n == 0 and num_kv // n <= fit)
    heads = num_heads // groups
    in_range = num_tokens
    if num_tokens * per_token * heads > workspace:
        in_range = max(1, workspace // (per_token * heads) // chunk) * chunk
    ranges = -(-num_tokens // in_range)
    num_chunks = -(-num_tokens // chunk)
    # Ids, keys and counts.
    index = 4 * (num_tokens * num_slots + num_chunks * chunk * slots + num_chunks * max_blocks) if num_slots else 0
    listed = next(n for n in range(heads, 0, -1) if heads % n == 0 and (n == 1 or n * index <= workspace))
    return Schedule(num_slots=num_slots, max_blocks=max_blocks, heads=heads, num_groups=groups, listed=listed, chunk=chunk,
                    tokens=-(-in_range // chunk) * chunk, num_ranges=ranges, index_bytes=listed * index)  # fmt: skip


def power_of_2(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()
