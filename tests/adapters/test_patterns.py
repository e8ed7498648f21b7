import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.patterns import PatternCompiler, UnsafePattern, suffix_pattern

NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 3, 12)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]

ATOMS = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", "[a-c0-9]", r"\d", r"\W", r"\b", "^", "$", r"\B"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda part: st.one_of(
        st.tuples(part, part).map("".join),
        st.tuples(part, part).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(part, st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?"])).map(
            "(?:{0[0]}){0[1]}".format
        ),
        part.map("({})".format),
        part.map("(?={})".format),
        part.map("(?!{})".format),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS, st.text("ab.0\n", max_size=10))
def test_matches_exactly_what_re_matches(expression: str, name: str) -> None:
    assert PatternCompiler().compile(expression)(name) == (re.fullmatch(expression, name) is not None)


@pytest.mark.parametrize(
    "expression",
    [
        r".*\.(q_proj|v_proj)$",
        r"model\.layers\.(0|3)\.self_attn\..*",
        r"^model\.layers\.(?!0\b)\d+\.(?:self_attn|mlp)\.(?P<name>\w+_proj)$",
        r"(?:.*?(?:language|model).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
        r"model.layers.3.mlp.down_proj",
        r"(.*\.)?(self_attn.q_proj)$",
        r"\Amodel.*[^v]_proj\Z",
        r"",
    ],
)
def test_matches_module_names_as_re_does(expression: str) -> None:
    matches = PatternCompiler().compile(expression)
    assert [matches(name) for name in NAMES] == [re.fullmatch(expression, name) is not None for name in NAMES]


@given(
    st.lists(
        st.one_of(st.text("ab.", max_size=4), EXPRESSIONS, st.tuples(EXPRESSIONS, EXPRESSIONS).map(")|(".join)),
        max_size=6,
    ),
    st.text("ab.0", max_size=8),
)
def test_of_keys_the_first_that_re_matches_counts(keys: list[str], name: str) -> None:
    expected = [at for at, key in enumerate(keys) if re.match(suffix_pattern(key), name)]
    assert PatternCompiler().compile_keys(keys)(name) == (expected[0] if expected else None)


def test_a_key_for_every_layer_of_a_large_model_is_no_work() -> None:
    names = [f"model.layers.{layer}.{part}.{name}" for layer in range(126) for part in "ab" for name in "cdefg"]
    first = PatternCompiler().compile_keys([f"k{i}" for i in range(50_000)] + names[::-1])
    assert [first(name) for name in names] == [50_000 + at for at in range(len(names))][::-1]


@pytest.mark.parametrize("expression", ["(a*)*" * 30 + "b", "(a|a)*" * 40 + "!", "(.*)*" * 50 + "!", "(?:.*.*.*.*)*!"])
def test_expressions_that_would_hang_re_are_answered(expression: str) -> None:
    assert not PatternCompiler().compile(expression)("a" * 120)


def test_work_is_bounded() -> None:
    compiler = PatternCompiler()
    matches = compiler.compile("(?:(?=a*b*c*d*)[a-z.])*" * 100)
    with pytest.raises(UnsafePattern, match="too long"):
        list(map(matches, NAMES * 1000))


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("(", "not valid"),
        ("*a", "not valid"),
        (r"(a)\1", "groupref"),
        ("(?i)a", "flags"),
        ("(?i:a)", "subpattern"),
        ("(?>a)b", "atomic"),
        ("(?<=a)b", "assert"),
        ("(" * 1000 + ")" * 1000, "nested"),
        ("a" * 5000, "longer"),
        ("a{99999999999999999999}", "not valid"),
    ],
)
def test_refuses_what_it_does_not_match(expression: str, problem: str) -> None:
    with pytest.raises(UnsafePattern, match=problem):
        PatternCompiler().compile(expression)
