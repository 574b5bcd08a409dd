"""Texts for property tests, of the pieces that make text hard."""

from hypothesis import strategies as st

FRAGMENTS = (
    *(
        "a",
        "I",
        " ",
        "  ",
        ".",
        "?",
        "the ",
        "Uber",
        "[SEP]",
        "##ing",
        "\r\n",
        "\n",
        "\t",
        "\0",
        "\x1b",
        "\x7f",
        "\x85",
    ),
    *("\u200b", "\u200d", "\u200e", "\u202e", "\u2066", "\ufeff", "\u00ad", "\u2028", "\u3000"),  # zero width, bidi
    *("\u0301", "\u0308\u0301", "e\u0301", "q\u0323\u0307", "\u20e3", "\ufe0f", "o\u0328\u0304"),  # combining
    *("é", "ß", "ẞ", "İ", "ı", "ſ", "ŉ", "ΐ", "ﬁ", "ǰ", "Σας", "ᾳ", "K", "և"),  # other lengths when case is folded
    *("👨\u200d👩\u200d👧\u200d👦", "👍🏽", "🇰🇷", "🇰", "🏴\U000e0067\U000e0062\U000e007f", "1\ufe0f\u20e3"),
    *("각", "\u1100\u1161\u11a8", "\u1112\u1161", "한국어", "漢字", "かな", "か\u3099", "ﾊﾞ"),
    *("กำ", "ที่นี่", "क्षि", "नमस्ते", "ক্ষ", "עברית", "مرحبا", "ﷺ", "𝒳", "\U0010ffff", "\ue000"),
)
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join),
    st.text(CHARACTERS, max_size=60),
    st.tuples(st.sampled_from(FRAGMENTS), st.integers(1, 150)).map(lambda pair: pair[0] * pair[1]),
)
SURROGATES = st.tuples(TEXTS, st.characters(categories=["Cs"]), TEXTS).map("".join)
