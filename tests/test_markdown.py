"""Names of others inside Markdown: no markup, no HTML."""

from mlip_jax.core.markdown import code, plain


def test_nothing_in_a_name_is_markup():
    assert plain("<img src=x>\n# a | [b](c) `d` &lt; *e*") == (
        r"\<img src=x\> # a \| \[b\](c) \`d\` \&lt; \*e\*"
    )
    assert plain("jsonl:my_pairs.jsonl") == "jsonl:my_pairs.jsonl"


def test_code_ends_where_it_should():
    assert code("csv:a b.csv") == "`csv:a b.csv`"
    assert code("a`` <b>\n`c") == "``` a`` <b> `c ```"
