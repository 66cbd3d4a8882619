"""The rule that gives each layer its attention (configs/layers.py), and the attention files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import AttentionConfig, ConfigError, RopeConfig


def kinds(rule: str, num_layers: int, **sizes: int) -> list[str]:
    return [str(layer) for layer in AttentionConfig(rule=rule, **sizes).per_layer(num_layers)]


F, M = "full", "moba(512, 3)"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("full", [F] * 6),
        ("moba", [M] * 6),
        ("all moba(128, 8)", ["moba(128, 8)"] * 6),
        ("last 3 full, rest moba", [M, M, M, F, F, F]),
        ("LAST 1 Full, REST MoBA", [M, M, M, M, M, F]),
        ("first 2 full, rest moba", [F, F, M, M, M, M]),
        ("every 2 full, rest moba(64, 2)", ["moba(64, 2)", F] * 3),
        ("layers 0 5 full, rest moba", [F, M, M, M, M, F]),
        ("layers 5 moba, last 2 full, rest moba( 4 , 1 )", ["moba(4, 1)"] * 4 + [F, M]),
        ("first 6 full", [F] * 6),
        ("every 2 moba, rest sliding(256)", ["sliding(256)", M] * 3),
        ("Sliding( 1 )", ["sliding(1)"] * 6),
    ],
)
def test_rules(rule, expected):
    assert kinds(rule, 6) == expected


def test_plain_moba_takes_the_configs_sizes():
    assert kinds("last 1 full, rest moba", 2, block_size=64, topk=7) == ["moba(64, 7)", F]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("", "does not end in an attention kind"),
        ("window", r"accepted: full, moba, moba\(BLOCK_SIZE, TOPK\), sliding\(WINDOW\)"),
        ("moba(512)", r"moba takes \(block_size, topk\)"),
        ("moba()", "does not end in an attention kind"),
        ("moba(512 3)", "does not end in an attention kind"),
        ("moba(4,, 3)", "does not end in an attention kind"),
        ("sliding", r"sliding takes \(window\)"),
        ("sliding(4, 3)", r"sliding takes \(window\)"),
        ("sliding(0)", "window must be at least 1"),
        ("moba(0, 3)", "must be at least 1"),
        ("full(4, 3)", "takes no numbers"),
        ("last full", "does not select layers; accepted: all, rest"),
        ("last 0 full", "does not select layers"),
        ("some 3 full", "does not select layers"),
        ("full,", "does not end in an attention kind"),
    ],
)
def test_unreadable_rules_are_refused_at_once(rule, message):
    with pytest.raises(ConfigError, match=message):
        AttentionConfig(rule=rule)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("last 2 full", r"layers \[0, 1, 2, 3\] of 6 are named by no clause"),
        (
            "full, rest moba",
            r"^rule='full, rest moba': 'rest moba\(512, 3\)' names no layer that is still free among 6: all 6 that it selects are named "
            r"before it; narrow what stands there, or leave this out$",
        ),
        ("last 100 full, rest moba", r"'last 100' is more layers than the 6 of the model$"),
        ("layers 6 full, rest moba", r"layers \[6\] do not exist; the model has layers 0..5"),
        (
            "every 7 full, rest moba",
            r"'every 7 full' names no layer that is still free among 6: 7 is more than there are; lower it, or leave this out$",
        ),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(rule, message):
    with pytest.raises(ConfigError, match=message):
        AttentionConfig(rule=rule).per_layer(6)


@pytest.mark.parametrize(
    ("nope", "expected"),
    [
        ("", []),
        (" ", []),
        ("all", [0, 1, 2, 3, 4, 5]),
        ("every 2", [1, 3, 5]),
        ("LAST 1, first 2", [0, 1, 5]),
        ("layers 0 5, rest", [*range(6)]),
    ],
)
def test_layers_without_positions(nope, expected):
    assert sorted(RopeConfig(nope=nope).nope_layers(6)) == expected


@pytest.mark.parametrize(
    ("nope", "message"),
    [
        ("evry 2", r"^nope='evry 2': 'evry 2' does not select layers; accepted: all, rest"),
        ("every 2,", r"^nope='every 2,': '' does not select layers"),
        ("every 2 full", r"'every 2 full' does not select layers"),
        ("every 0", "does not select layers"),
    ],
)
def test_unreadable_lists_of_layers_are_refused_at_once(nope, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(nope=nope)


@pytest.mark.parametrize(
    ("nope", "message"),
    [
        ("layers 6", r"^nope='layers 6': layers \[6\] do not exist"),
        ("all, last 1", "'last 1' names no layer that is still free among 6: all 1 that it selects are named before it; narrow"),
    ],
)
def test_lists_that_do_not_fit_the_model_are_refused(nope, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(nope=nope).nope_layers(6)


@given(st.integers(1, 40), st.integers(1, 40))
def test_last_and_first_cut_where_they_say(num_layers, count):
    if count >= num_layers:
        with pytest.raises(ConfigError, match=r"names no layer|is more layers than"):
            kinds(f"last {count} full, rest moba", num_layers)
    else:
        assert kinds(f"last {count} full, rest moba", num_layers) == [M] * (num_layers - count) + [F] * count
        assert kinds(f"first {count} full, rest moba", num_layers) == [F] * count + [M] * (num_layers - count)
