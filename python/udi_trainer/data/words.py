"""Splits text into words, in all scripts.

Words consist of letters, digits, underscores and combining marks. Chinese, Japanese, Thai, Lao, Khmer and Burmese put
no spaces between words, and finding them takes a dictionary of each language. Their runs become characters and pairs of
characters instead, as in search engines.
"""

import functools
import re
import unicodedata

UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # 々 and 〇
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Chinese characters
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # halfwidth Katakana
    (0x20000, 0x3FFFF),
)


@functools.cache
def pattern() -> re.Pattern[str]:
    """A character of an unspaced script with its marks, or a word of another script."""
    points = [*range(0x300, 0x1F000), *range(0xE0100, 0xE01F0)]  # all marks are among them
    marks = "".join(chr(point) for point in points if unicodedata.category(chr(point))[0] == "M")
    unspaced = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED)
    other = rf"(?![{unspaced}])"
    joiners = "\u200c\u200d"
    return re.compile(rf"(?P<character>(?=\w)[{unspaced}][{marks}]*)|{other}\w(?:{other}[\w{marks}{joiners}])*")


def words_of(text: str, limit: int) -> list[str]:
    """The words of a text in lower case; ``limit``: how many words and unspaced characters of it are read."""
    words: list[str] = []
    previous, end = "", -1  # the last unspaced character, and where it ended
    for i, match in enumerate(pattern().finditer(unicodedata.normalize("NFC", text.lower()))):
        if i == limit:
            break
        word = match[0]
        words.append(word)
        if match["character"]:
            if match.start() == end:
                words.append(previous + word)
            previous, end = word, match.end()
    return words
