"""The set of digests against Python's own."""

import random

from data.duplicates import DigestSet


def test_it_says_of_each_digest_whether_it_is_new(tmp_path):
    rng = random.Random(0)
    some = [rng.randbytes(16) for _ in range(5000)]
    # The same slot for all, the last slot, and digests that differ in one half alone.
    some += [i.to_bytes(8, "big") + bytes(8) for i in range(1, 40)] + [rng.randbytes(8) + b"\xff" * 8 for _ in range(40)]
    asked = [rng.choice(some) for _ in range(12_000)]
    expected: set[bytes] = set()
    found = DigestSet(tmp_path)
    for digest in asked:
        assert found.add(digest) is (digest not in expected)
        expected.add(digest)
    assert len(found) == len(expected)
    again = DigestSet(tmp_path)
    again.update(expected)
    assert not any(again.add(digest) for digest in expected)
    assert list(tmp_path.iterdir()) == []  # a file without a name
    found.close()
    again.close()
