"""Words of all scripts."""

import random
import re

import pytest

from udi_trainer import train
from udi_trainer.data.words import words_of


@pytest.mark.parametrize("text, wanted", [
    ("Don't panic, it's 42_x!", ["don", "t", "panic", "it", "s", "42_x"]),
    ("Süß naïve ΑΒΓ Привет", ["süß", "naïve", "αβγ", "привет"]),
    ("हिन्दी में लिखा", ["हिन्दी", "में", "लिखा"]),
    ("مَرْحَبًا بالعالم", ["مَرْحَبًا", "بالعالم"]),
    ("می‌خواهم", ["می‌خواهم"]),
    ("한국어 문장", ["한국어", "문장"]),
    ("我很高兴。", ["我", "很", "我很", "高", "很高", "兴", "高兴"]),
    ("我 you 很", ["我", "you", "很"]),
    ("日本語、カナ", ["日", "本", "日本", "語", "本語", "カ", "ナ", "カナ"]),
    ("ง่าย", ["ง่", "า", "ง่า", "ย", "าย"]),
    ("GPT很好", ["gpt", "很", "好", "很好"]),
    ("cafe\u0301", ["café"]),
    ("\u200d \u0301 ...", []),
])  # fmt: skip
def test_words(text, wanted):
    assert words_of(text, 64) == wanted


def test_spaced_scripts_are_split_as_by_w():
    pick = random.Random(0)
    letters = "abcÄßéñøЖщяΩλא0123_ \t\n.,;:!?-'\"()€"
    for _ in range(200):
        text = "".join(pick.choice(letters) for _ in range(50))
        assert words_of(text, 1000) == re.findall(r"\w+", text.lower())


def test_limit():
    assert words_of("a b c d", 3) == ["a", "b", "c"]
    assert words_of("很高兴了", 3) == ["很", "高", "很高", "兴", "高兴"]


@pytest.mark.parametrize("ending", [None, ".txt", ".TXT"])
def test_training_on_sentences_without_spaces(folder, options, ending):
    """A word among random characters tells the label, in cells and in files."""
    pick, keys = random.Random(0), ["高兴", "难过", "生气"]
    rows = []
    for i in range(240):
        text = [chr(0x4E00 + pick.randrange(3000)) for _ in range(8)]
        text.insert(pick.randrange(9), keys[i % 3])
        cell = "".join(text) + "。"
        if ending:
            folder._path(f"t/{i}{ending}").write_text(cell, encoding="utf-8")
            cell = f"t/{i}{ending}"
        split = ("train", "train", "train", "test", "val")[i // 3 % 5]
        rows.append({"text": cell, "x": pick.random(), "label": "abc"[i % 3], "split": split})
    result = train("manifest", "ensemble", manifest=folder.manifest(rows), epochs=12, batch_size=16, **options)
    assert result.metrics["unimodal"]["text"]["test_acc"] > 0.9
