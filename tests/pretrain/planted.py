"""Documents made up for the tests of the prepare stage, with duplicates and worse planted among them."""

import random

WORDS = (
    "river mountain engine letter window garden winter summer bread copper silver market harbour bridge castle forest island "
    "teacher painter sailor doctor farmer singer lawyer writer builder weaver soldier hunter question answer reason measure pattern "
    "number circle shadow colour surface corner border centre distance moment season century morning evening journey history story "
    "began followed carried opened closed crossed measured described painted remembered discovered explained repaired counted"
).split()
LITTLE = "the of and to in that with for from by over under near after before between".split()
TEMPLATE = (
    "Welcome to {0}. Our charming {0} resort lies on the {1} coast, and {2} founded it. Guests like {3}, and visitors should try the "
    "{3} of {2}. If you travel here by the {1}, please notice the house of {2}. Book a room online today, enjoy {3} near the {1}. "
    "Every holiday includes breakfast, wireless internet, towels, parking, swimming pool and {2} excursions. Families with {3} receive "
    "generous discounts throughout the low season; ask {0} reception about vouchers, refunds, transfers and {1} tickets. Reviews "
    "praise friendly staff, spotless bathrooms, {3} menus, quiet balconies, comfortable mattresses and {2} hospitality. Cancellation "
    "remains free until {0} arrival, terms apply, prices exclude {1} taxes, deposits, insurance, laundry, minibar and {3} rental."
)
GERMAN = (
    "Der Fluss entspringt in den Bergen und fließt durch das weite Tal bis zum Meer. Die Menschen in den Dörfern leben seit Jahrhunderten "
    "von der Fischerei und vom Handel mit den Städten an der Küste. Im Winter ist es dort sehr kalt, und der Schnee bleibt lange liegen. "
)
SPAM = "BUY NOW!!! click here\n" * 40


def essay(number: int, sentences: int = 14, topic: str | None = None) -> str:
    """English-looking prose, the same for the same number; of a ``topic`` with words of its own."""
    drawn = random.Random(f"essay {number}")
    words_of_topic = WORDS if topic is None else [
        "".join(random.Random(f"{topic} {place}").choices("abcdefghijklmnopqrstuvwxyz", k=7)) for place in range(40)
    ]
    lines = []
    for _ in range(sentences):
        words = []
        for _ in range(drawn.randint(4, 8)):
            words += [drawn.choice(LITTLE), drawn.choice(words_of_topic)]
        lines.append(" ".join(words).capitalize() + ".")
    return " ".join(lines)


def nearly(text: str, number: int) -> str:
    """The same with a few words put in."""
    sentences = text.split(". ")
    sentences[number % len(sentences)] += f", and number {number} meant nothing to them"
    return ". ".join(sentences)


def templated(number: int) -> str:
    """A page made from a template: so many words differ that few runs of five are shared with another."""
    drawn = random.Random(f"town {number}")
    return TEMPLATE.format(*("".join(drawn.sample(WORDS, 2)) for _ in range(4)))


def program(number: int) -> str:
    drawn = random.Random(f"program {number}")
    names = drawn.sample(WORDS, 6)
    lines = [f'"""Functions on the {names[0]} of a {names[1]}."""', "", "import math", ""]
    for name in names:
        other, factor = drawn.choice(WORDS), drawn.randint(2, 99)
        lines += [f"def {name}_{other}({other}, {names[2]}={factor}):", f'    """The {name} of {other}."""', f"    # {essay(number * 10, 1)}"]
        lines += [f"    {name} = math.sqrt({other} * {factor}) + {drawn.randint(100, 999)}", f"    return {name} - {names[2]}", ""]
    return "\n".join(lines)
