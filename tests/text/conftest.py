from __future__ import annotations

import pytest

# Multilingual text, code, emoji, marks and odd whitespace, line by line.
PAGE = (
    "The quick brown fox jumps over the lazy dog. It's 12345.67 o"
    "'clock, DON'T you think?   Three   spaces; tabs\there.\n"
    "Füße, Straße, ÄÖÜ; café naïve — “quotes” … l'été, où ça? Ελλ"
    "ηνικά: Ωραία μέρα. Русский: Привет, как дела?\n"
    "中文：今天天气很好，我们去公园吧。 日本語：吾輩は猫である。名前はまだ無い。カタカナ 한국어: 안녕하세요 세계 الع"
    "ربية: مرحبا بالعالم עברית: שלום עולם\n"
    "हिन्दी: नमस्ते दुनिया ไทย: สวัสดีชาวโลก தமிழ்: வணக்கம் \n"
    "Emoji: 😀 👍🏽 👨\u200d👩\u200d👧\u200d👦 🇩🇪 🏳\ufe0f\u200d🌈 ✨ 1\ufe0f\u20e3 ☺\ufe0f\n"
    "Zalgo: Z\u0351\u036b\u0313\u036a\u0302\u036b\u033d\u034f\u0334"
    "\u0319\u0324\u031e\u0349\u035a\u032f\u031e\u0320\u034dA\u0334"
    "\u0335\u031c\u0330\u0354\u036b\u0357\u0362L\u0320\u0368\u0367"
    "\u0369\u0358G\u0334\u033b\u0348\u034d\u0354\u0339\u0311\u0357"
    "\u030e\u0305\u035b\u0301Ǫ\u0335\u0339\u033b\u031d\u0333\u0342"
    "\u030c\u030c\u0358!\n"
    "def fib(n: int) -> int:\n"
    '    """Return the n-th Fibonacci number."""\n'
    "    if n < 2:\n"
    "        return n\n"
    "\t# tab comment\n"
    "    return fib(n - 1) + fib(n - 2)  # 0x1F, 1e-9, a[i]+=b;\n"
    "\n"
    "\n"
    '<html><body class="x">&nbsp;</body></html> {"key": [1, 2, 3], "π": 3.14159}\n'
    "SELECT * FROM t WHERE a<>'b' -- comment\n"
    "https://example.org/path?q=1&r=%20x  #hashtag @user $100 50% ^_^ ½ Ⅻ ² ٣٤٥ ▁ x▁y\n"
    "   leading and trailing   \n"
    "     \u3000 \u200b zero\u200bwidth\ufeffbom é é Å\n"
)

LINES = (
    *PAGE.splitlines(keepends=True),
    "", " ", "  ", "a", " a", "  a", "a ", "\n", "\n\n\n", "\r\n \t\n", "x" * 300, " " * 70, "\0\x01",
    "1234567 12 3", "I'LL we've 'S \u2019s", "e\u0301 \u00e9", "\u2581", "a\u2581b",
)  # fmt: skip


@pytest.fixture(scope="session")
def page() -> str:
    return PAGE


@pytest.fixture(scope="session")
def lines() -> tuple[str, ...]:
    return (PAGE, *LINES)
