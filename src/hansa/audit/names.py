"""Made-up names of persons, organisations and places."""

from random import Random

from hansa.audit.entities import words
from hansa.audit.falsify import Names

_START = words("B Br D Dr F G Gr H J K Kl L M N P Pr R S St T Tr V W Z")
_VOWEL = ["a", "e", "i", "o", "u", "ei", "ou", "ia"]
_MIDDLE = words("l r n m v d k t s nd rv lm st ld rk")
_PLACE = words("berg by dal field ford ham havn minster mouth stad ton vik wick")
_FIRST_END = ["a", "e", "i", "o", "en", "us", "is", "ar", "an", "el"]
_LAST_END = ["er", "sen", "sson", "man", "ov", "ek", "ini", "ard", "ley", "ström"]
ORGANISATIONS = words(
    "Academy Agency Association Bank Company Foundation Holdings Institute Laboratories "
    "Motors Railways Society Trust University"
)


def stem(random: Random) -> str:
    """Return the beginning of a name."""
    middle = random.choice(_VOWEL) + random.choice(_MIDDLE)
    more = random.choice(_VOWEL) + random.choice(_MIDDLE) if random.random() < 0.3 else ""
    return random.choice(_START) + middle + more


def person(random: Random) -> str:
    """Return a first and a last name."""
    return f"{stem(random)}{random.choice(_FIRST_END)} {stem(random)}{random.choice(_LAST_END)}"


def place(random: Random) -> str:
    """Return the name of a town."""
    return f"{stem(random)}{random.choice(_VOWEL[:5])}{random.choice(_PLACE)}"


def organisation(random: Random) -> str:
    """Return the name of an organisation."""
    return f"{stem(random)}{random.choice(_VOWEL[:5])} {random.choice(ORGANISATIONS)}"


def pool(random: Random, num: int = 40) -> Names:
    """Return names by kind, for false values to be chosen among."""
    return {
        "person": [person(random) for _ in range(num)],
        "place": [place(random) for _ in range(num)],
        "organisation": [organisation(random) for _ in range(num)],
    }
